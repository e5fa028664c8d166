// When a request that a busy server refused is sent again, and when the person is asked instead.

// Of errors that end a stream, those that a later try may not have: as explain_failure of the server names them
export const PASSING_CODES = ["shutting_down", "cancelled", "engine_lost"];
export const MAX_WAIT_SECONDS = 300; // for one request
const MAX_BACK_OFF_SECONDS = 30; // where the server does not say when it has room

/** A server that was busy for as long as a request waits. */
export class BusyServer extends Error {
  constructor() {
    super(`the server has been busy for ${Math.round(MAX_WAIT_SECONDS / 60)} minutes, and has drawn nothing of this yet`);
  }
}

/** Return the seconds of a Retry-After header, which has seconds or a date; null if it has neither. */
export function readRetryAfter(header, now = Date.now()) {
  if (!header?.trim()) return null;
  const seconds = Number.isFinite(Number(header)) ? Number(header) : (Date.parse(header) - now) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

/**
 * Return after how many seconds a refused request is sent again.
 * waited: the seconds, and tries: the refusals, before this one. Raises the error if it is final, and BusyServer beyond the limit.
 */
export function planWait(error, { waited, tries }) {
  const isBusy = (error.status === 429 || error.status === 503) && !error.isFinal;
  if (!isBusy) throw error;
  const seconds = Math.max(1, error.retryAfter ?? Math.min(2 ** tries, MAX_BACK_OFF_SECONDS));
  // Asking earlier than the server says would only be refused
  if (waited + seconds > MAX_WAIT_SECONDS) throw new BusyServer();
  return seconds;
}

/** Return what a person is told of a wait. error: the refusal; a key may have a limit of its own, of which others know nothing. */
export function describeWait(seconds, error) {
  const reason = error.code === "key_limit" ? "As many of your images wait as your key may have" : "The server is busy";
  return `${reason}. Asking again in ${Math.ceil(seconds)} s`;
}

/** Return what a function returns, which is called again while a busy server refuses. onWait: called with the words for each wait. */
export async function retryWhileBusy(run, { sleep, onWait = () => {} }) {
  for (let waited = 0, tries = 0; ; tries += 1) {
    try {
      return await run();
    } catch (error) {
      const seconds = planWait(error, { waited, tries });
      onWait(describeWait(seconds, error));
      await sleep(seconds);
      waited += seconds;
    }
  }
}
