// How much of each thing is in a mix, and the steps of a strip. No browser is needed.

/** Shares with sum 1 of the values of some sliders; null if all are 0. */
export function normalizeWeights(values) {
  const total = values.reduce((sum, value) => sum + Math.max(0, value), 0);
  return total > 0 ? values.map((value) => Math.max(0, value) / total) : null;
}

/** Shares as whole percents whose sum is 100: the largest remainders are rounded up. Without any, all are 0. */
export function roundShares(shares) {
  if (shares.every((share) => share === 0)) return shares.map(() => 0);
  const percents = shares.map((share) => Math.floor(100 * share));
  const missing = 100 - percents.reduce((sum, percent) => sum + percent, 0);
  const order = shares.map((share, place) => place).sort((a, b) => 100 * shares[b] - percents[b] - (100 * shares[a] - percents[a]));
  for (const place of order.slice(0, missing)) percents[place] += 1;
  return percents;
}

/** Equally spaced numbers from the first to the last, both included. */
export function spaceNumbers(first, last, count) {
  if (count < 2) return [last];
  return Array.from({ length: count }, (_, place) => round(first + ((last - first) * place) / (count - 1)));
}

/** The shares of a strip from each of `count` things to the next, with `frames` steps for each way, ends included. */
export function planStrip(count, frames) {
  const rows = [];
  for (let start = 0; start < count - 1; start++) {
    for (const share of spaceNumbers(0, 1, frames)) {
      if (start > 0 && share === 0) continue; // the end of the way before
      const row = new Array(count).fill(0);
      row[start] = round(1 - share);
      row[start + 1] = share;
      rows.push(row);
    }
  }
  return rows;
}

/** A list in parts of at most `size` entries, as equal as can be. */
export function splitEvenly(list, size) {
  const count = Math.ceil(list.length / size);
  return Array.from({ length: count }, (_, part) =>
    list.slice(Math.round((part * list.length) / count), Math.round(((part + 1) * list.length) / count)),
  );
}

function round(number) {
  return Math.round(number * 10_000) / 10_000;
}
