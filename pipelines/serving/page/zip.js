// A ZIP file of files as they are: images are compressed already.

let table = null;

/** Return the checksum that ZIP files have of each file. */
export function crc32(bytes) {
  table ??= Uint32Array.from({ length: 256 }, (_, start) => {
    let value = start;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
    return value;
  });
  let checksum = 0xffffffff;
  for (const byte of bytes) checksum = (checksum >>> 8) ^ table[(checksum ^ byte) & 255];
  return (checksum ^ 0xffffffff) >>> 0;
}

/** Return a ZIP file as a Blob. files: [{name, blob, created}], with names that differ. */
export async function buildZip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, blob, created } of files) {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const encoded = new TextEncoder().encode(name);
    const about = describeEntry(bytes, encoded, new Date(created));
    parts.push(buildHeader(0x04034b50, about, []), encoded, bytes);
    // The directory repeats the header, with the place of the file
    directory.push(buildHeader(0x02014b50, about, [0, 0, 0, 0, 0, offset & 0xffff, offset >>> 16]), encoded);
    offset += 30 + encoded.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, size, true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}

function describeEntry(bytes, name, date) {
  const time = (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1);
  const day = ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  const checksum = crc32(bytes);
  const words = (value) => [value & 0xffff, value >>> 16];
  // Version 2.0, names in UTF-8, stored without compression
  return [20, 0x0800, 0, time, day, ...words(checksum), ...words(bytes.length), ...words(bytes.length), name.length, 0];
}

function buildHeader(signature, about, more) {
  const isDirectory = more.length > 0;
  const fields = [...(isDirectory ? [20] : []), ...about, ...more];
  const view = new DataView(new ArrayBuffer(4 + 2 * fields.length));
  view.setUint32(0, signature, true);
  fields.forEach((value, index) => view.setUint16(4 + 2 * index, value, true));
  return new Uint8Array(view.buffer);
}
