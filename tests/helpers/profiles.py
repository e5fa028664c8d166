"""Colour profiles, built byte by byte by the ICC's specification, and what they mean in closed form."""

import struct

import numpy as np

D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(xy):
    return np.array([xy[0] / xy[1], 1, (1 - xy[0] - xy[1]) / xy[1]])


def matrix_of(primaries, white=D65):
    """The matrix from linear RGB to XYZ."""
    columns = np.stack([to_xyz(xy) for xy in primaries], axis=1)
    return columns * np.linalg.solve(columns, to_xyz(white))


def adaptation(source, target):
    """Bradford's matrix between two whites."""
    gains = (BRADFORD @ to_xyz(target)) / (BRADFORD @ to_xyz(source))
    return np.linalg.solve(BRADFORD, gains[:, None] * BRADFORD)


def decode(values):
    """sRGB's curve: values in [0, 1] to light."""
    values = np.asarray(values, float)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode(light):
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def p3_to_srgb(color, curve=decode):
    """What bytes in Display P3 are in sRGB."""
    light = np.linalg.solve(matrix_of(SRGB), matrix_of(DISPLAY_P3) @ curve(np.array(color) / 255))
    return (encode(light) * 255).round().astype(int).tolist()


def lab_to_srgb(lab):
    """What a colour in Lab, whose white is D50, is in sRGB."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * to_xyz(D50)
    light = np.linalg.solve(matrix_of(SRGB), adaptation(D50, D65) @ xyz)
    return (encode(light) * 255).round().astype(int).tolist()


def fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def build(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2.4 with these tags, beside the required ones."""
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8) + bytes(3) + bytes(67)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"free\0", **tags}
    if pcs == b"XYZ ":
        tags[b"wtpt"] = b"XYZ " + bytes(4) + fixed(*to_xyz(D50))
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I", start + len(body)) + bytes(4) + struct.pack(">I", 0x02400000) + kind + space + pcs
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def write_curve(function):
    table = [round(float(function(i / 1023)) * 65535) for i in range(1024)]
    return b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *table)


def gamma(values):
    return np.asarray(values, float) ** 2.2


def rgb_profile(primaries=DISPLAY_P3, decode=decode) -> bytes:
    columns = (adaptation(D65, D50) @ matrix_of(primaries)).T
    tags = {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column) for name, column in zip((b"r", b"g", b"b"), columns)}
    tags |= {name + b"TRC": write_curve(decode) for name in (b"r", b"g", b"b")}
    return build(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return build(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": write_curve(lambda value: value**gamma)})


def cmyk_profile(inks) -> bytes:
    """A profile in which ink i alone has the Lab inks[i]; other corners are black, between them it is linear."""
    corners = [(0.0, 0.0, 0.0)] * 16
    corners[0] = (100.0, 0.0, 0.0)
    for number, lab in enumerate(inks):  # the first ink counts slowest
        corners[8 >> number] = lab
    bytes_of = bytes(round(v) for lab in corners for v in (lab[0] * 2.55, lab[1] + 128, lab[2] + 128))
    straight = bytes(range(256))
    matrix = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + straight * 4 + bytes_of + straight * 3
    return build(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table})
