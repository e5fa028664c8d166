// Text chunks of PNG files: images that were drawn here carry their settings in one.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MAX_RECORD_BYTES = 1_000_000;

/** Return the record of an image that was drawn here; null for any other file. */
export async function readRecord(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((value, index) => bytes[index] !== value)) return null;
  const text = findText(bytes, "t2i");
  if (text === null) return null;
  try {
    const record = JSON.parse(text);
    return record !== null && typeof record === "object" && !Array.isArray(record) ? record : null;
  } catch {
    return null;
  }
}

/** Return the text under a keyword, of an iTXt or tEXt chunk without compression; null if there is none. */
export function findText(bytes, keyword) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let start = SIGNATURE.length; start + 12 <= bytes.length; ) {
    const length = view.getUint32(start);
    const type = String.fromCharCode(...bytes.subarray(start + 4, start + 8));
    const data = bytes.subarray(start + 8, start + 8 + length);
    // The length of a damaged chunk leads beyond the file
    if (data.length < length || type === "IEND") return null;
    if ((type === "iTXt" || type === "tEXt") && length <= MAX_RECORD_BYTES) {
      const found = readTextChunk(type, data);
      if (found?.keyword === keyword) return found.text;
    }
    start += 12 + length;
  }
  return null;
}

function readTextChunk(type, data) {
  const end = data.indexOf(0);
  if (end < 0) return null;
  const keyword = new TextDecoder("latin1").decode(data.subarray(0, end));
  if (type === "tEXt") return { keyword, text: new TextDecoder("latin1").decode(data.subarray(end + 1)) };
  // iTXt: a flag and a method of compression, then a language and a translated keyword, which are empty here
  if (data[end + 1] !== 0) return null;
  const language = data.indexOf(0, end + 3);
  const translated = language < 0 ? -1 : data.indexOf(0, language + 1);
  return translated < 0 ? null : { keyword, text: new TextDecoder().decode(data.subarray(translated + 1)) };
}
