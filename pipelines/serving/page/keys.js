// The keyboard: shortcuts of one character, which a person may turn off, and what Escape means.

const KEPT_UNDER = "t2i.shortcuts";

export const areShortcutsOn = () => localStorage.getItem(KEPT_UNDER) !== "off";

export const turnShortcuts = (on) => localStorage.setItem(KEPT_UNDER, on ? "on" : "off");

/** Return whether a key does something: single characters, which speech input types by accident, only while they are on. */
export const isTaken = (key, areOn) => areOn || [...key].length > 1;

/** Return whether a key press belongs to an input method, whose candidates Enter takes and Escape closes. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** Return what Escape means on the page: "close" the drawer, "cancel" the newest drawing, or null. */
export function readEscape({ hasMenu, inChoice, isDrawerOpen, isDrawing }) {
  // The browser closes the menu by this press
  if (hasMenu) return null;
  if (isDrawerOpen) return "close";
  return isDrawing && !inChoice ? "cancel" : null;
}
