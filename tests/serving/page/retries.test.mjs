// Run by `node --test`: how long the page waits for a busy server, and what it never sends again.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ApiError } from "../../../pipelines/serving/page/api.js";
import { BusyServer, MAX_WAIT_SECONDS, planWait, readRetryAfter, retryWhileBusy } from "../../../pipelines/serving/page/retries.js";

const refuse = (status, given) => new ApiError(status, { error: { message: "no" } }, given);

/** Return the waits before a server has room after some refusals, and what came of it. */
async function watchWaits(errors) {
  const waits = [], told = [];
  const run = async () => {
    if (errors.length) throw errors.shift();
    return "drawn";
  };
  const end = await retryWhileBusy(run, { sleep: async (seconds) => waits.push(seconds), onWait: (text) => told.push(text) }).catch(
    (error) => error,
  );
  return { waits, end, told };
}

test("Retry-After is read as seconds or a date", () => {
  assert.equal(readRetryAfter("7"), 7);
  assert.equal(readRetryAfter("Wed, 21 Oct 2026 07:28:30 GMT", Date.UTC(2026, 9, 21, 7, 28, 0)), 30);
  assert.equal(readRetryAfter("Wed, 21 Oct 2026 07:28:30 GMT", Date.UTC(2026, 9, 21, 8)), 0);
  for (const header of [null, "", "soon"]) assert.equal(readRetryAfter(header), null);
});

test("the page waits as long as the server says, else longer each time", async () => {
  const { waits, end } = await watchWaits([refuse(429, { retryAfter: 90 }), refuse(503, { retryAfter: 0 }), refuse(503), refuse(503), refuse(429, { retryAfter: 2 })]);
  assert.deepEqual(waits, [90, 1, 4, 8, 2]);
  assert.equal(end, "drawn");
});

test("a person is told whether the server is busy or their own key is at its limit", async () => {
  const atLimit = new ApiError(429, { error: { message: "no", code: "key_limit" } }, { retryAfter: 3 });
  const { told } = await watchWaits([refuse(429, { retryAfter: 1.2 }), atLimit]);
  assert.deepEqual(told, ["The server is busy. Asking again in 2 s", "As many of your images wait as your key may have. Asking again in 3 s"]);
});

test("a server that stays busy is asked no longer than the limit", async () => {
  const { waits, end } = await watchWaits(Array.from({ length: 1000 }, () => refuse(503, { retryAfter: 5 })));
  assert.equal(waits.length, MAX_WAIT_SECONDS / 5);
  assert.ok(end instanceof BusyServer);
  assert.match(end.message, /busy for 5 minutes/);
  assert.throws(() => planWait(refuse(429, { retryAfter: MAX_WAIT_SECONDS + 1 }), { waited: 0, tries: 0 }), BusyServer);
});

test("other errors are final at once", async () => {
  for (const error of [refuse(413), refuse(500), refuse(503, { isFinal: true }), new DOMException("", "AbortError")]) {
    assert.deepEqual(await watchWaits([error]), { waits: [], end: error, told: [] });
  }
});
