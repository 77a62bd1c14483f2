"""Dequantization of the ggml types whose codes are points of a lattice: IQ1, IQ2 and IQ3.

Eight (IQ3: four) neighbours share a code, the number of a point in the type's grid; all types but IQ1 store signs
beside it. Source: the block structures of ggml (ggml-common.h) and their reference dequantization; the grids are
those of E8 lattice points that ggml's author found most frequent in quantized models, in ascending order.
Input: uint8 [n, bytes per block]; output: float32 [n, 256].
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Floats = NDArray[np.float32]

_COORDINATES: dict[str, tuple[int, ...]] = {
    "IQ2_XXS": (8, 25, 43),
    "IQ2_XS": (8, 25, 43),
    "IQ2_S": (8, 25, 43),
    "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": (1, 3, 5, 7, 9, 11, 13, 15),
    "IQ1_S": (-1, 0, 1),
}
"""The values that a coordinate of a grid point can have; points have 8 coordinates, or 4 where these are 8."""

# Which points are in a grid: points as numbers whose digits are their coordinates, the first one the least, a bit each,
# least bit first; zlib, base 85.
_MEMBERS: dict[str, str] = {
    "IQ2_XXS": (
        "c-nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd"
        "4Mw`?l*l~*(z5~c8Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-@@TSk)X7om@"
        "@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1wL(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"
    ),
    "IQ2_XS": (
        "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-fCU6QVt|)*=>o"
        "J=N8h~B3mmYKBw*Y)Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-u3GzO}jM8X_r-*1yt"
        "ubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-pQ1yByIl9%`W3mW#F%j~<yh(N0zSL"
        "~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE=SK;cc#9vM%q_=>7msuqjC"
    ),
    "IQ2_S": (
        "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAk"
        "BEEtarKv-X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$Az"
        "Rb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#"
        "Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(Jyj"
        "C6"
    ),
    "IQ3_XXS": (
        "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGsjr"
        "X>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%Xv"
        "Hjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"
    ),
    "IQ3_S": (
        "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2"
        "OXCI^OquXIKLt}o^pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U"
        "+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+()?*sDei}n1QT95(J|p-wR7#Aht{0!Hx!aZfy;"
        "cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYlKPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"
    ),
    "IQ1_S": (
        "c-k#eK}(!R7=CxE;dM-9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8Vt"
        "nDuD#8?@Vw9Syw7v(LR2?w<}y}3b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!A"
        "jh1yxWA4l1OzVO1-XRyWBes^wA;LAoBq<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}d"
        "P%c;av8KJU^mWiJv*28-WD<$YEG%#}+D!ES;XeDuFD(VlG#i@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}"
        "O@H(bLXvHn!_OntvSw2GXTKiD_6XGLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?"
        "+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%>fQq-z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU_YQ=)6;l3U7EjmAKr#y2F0kdO91c"
        "}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz$6Ckekcj5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$cM#il(dTBx(R&"
        "0u-;P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJBbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-Egd@Fdf5G@Dhe"
        "eu*|v(bMFD;1sQ1"
    ),
}

_DELTA = np.float32(0.125)  # IQ1: what is added to all coordinates, or subtracted


@functools.cache
def grid(name: str) -> Floats:
    """The points of a type's grid, float32 [points, 8 or 4], read-only."""
    values = np.array(_COORDINATES[name], np.float32)
    packed = np.frombuffer(zlib.decompress(base64.b85decode(_MEMBERS[name])), np.uint8)
    numbers = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
    dimensions = 4 if len(values) == 8 else 8
    points: Floats = values[numbers[:, None] // len(values) ** np.arange(dimensions) % len(values)]
    points.flags.writeable = False
    return points


def points_of(type_name: str) -> Floats | None:
    """The points that codes of a stock type stand for, as :func:`grid` gives them; None where they are numbers."""
    name = "IQ1_S" if type_name == "IQ1_M" else type_name
    return grid(name) if name in _COORDINATES else None


def _half(b: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _words(b: Bytes) -> Words:
    return np.ascontiguousarray(b).view("<u2")


def _nibble_scales(b: Bytes) -> Floats:
    """Two scales in a byte, the first in its low half."""
    return np.stack([b & 15, b >> 4], axis=2).reshape(len(b), -1).astype(np.float32)


def _signed(magnitude: Floats, signs: Bytes) -> Floats:
    """Apply sign bits, uint8 [n, 32], to magnitudes [n, points, coordinates]; a set bit is a minus."""
    negative = np.unpackbits(signs, axis=1, bitorder="little").view(bool)
    flat = magnitude.reshape(len(magnitude), -1)
    return np.where(negative, -flat, flat)


def _shared_signs(codes: NDArray[np.unsignedinteger[Any]]) -> Bytes:
    """Seven sign bits in each of the codes; the eighth makes their number even."""
    low: Bytes = (codes & 127).astype(np.uint8)
    parity: Bytes = np.bitwise_count(low) & np.uint8(1)
    return low | (parity << np.uint8(7))


def _scaled(scale: Floats, values: Floats) -> Floats:
    """Scales [n, groups] times values [n, 256]."""
    return np.repeat(scale, 256 // scale.shape[1], axis=1) * values


def _signs_and_scale(b: Bytes) -> tuple[Bytes, Floats]:
    """32-bit words of four times seven sign bits and a scale of 4 bits: signs [n, 4 per word], scales [n, words]."""
    words = np.ascontiguousarray(b).view("<u4")
    fields = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)).reshape(len(b), -1)
    return _shared_signs(fields.astype(np.uint32)), (words >> np.uint32(28)).astype(np.float32)


def _iq2_xxs(b: Bytes) -> Floats:
    halves = b[:, 2:].reshape(len(b), 8, 2, 4)
    signs, scale = _signs_and_scale(halves[:, :, 1].reshape(len(b), 32))
    points = grid("IQ2_XXS")[halves[:, :, 0].reshape(len(b), 32)]
    return _scaled(_half(b, 0) * (np.float32(0.5) + scale) * np.float32(0.25), _signed(points, signs))


def _iq2_xs(b: Bytes) -> Floats:
    codes = _words(b[:, 2:66])
    scale = _half(b, 0) * (np.float32(0.5) + _nibble_scales(b[:, 66:])) * np.float32(0.25)
    signs = _shared_signs((codes >> 9).astype(np.uint16))
    return _scaled(scale, _signed(grid("IQ2_XS")[codes & 511], signs))


def _iq2_s(b: Bytes) -> Floats:
    high = (b[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    codes = b[:, 2:34].astype(np.uint16) | (high.reshape(len(b), 32).astype(np.uint16) << 8)
    scale = _half(b, 0) * (np.float32(0.5) + _nibble_scales(b[:, 74:])) * np.float32(0.25)
    return _scaled(scale, _signed(grid("IQ2_S")[codes], b[:, 34:66]))


def _iq3_xxs(b: Bytes) -> Floats:
    signs, scale = _signs_and_scale(b[:, 66:])
    points = grid("IQ3_XXS")[b[:, 2:66]]
    return _scaled(_half(b, 0) * (np.float32(0.5) + scale) * np.float32(0.5), _signed(points, signs))


def _iq3_s(b: Bytes) -> Floats:
    ninth = np.unpackbits(b[:, 66:74], axis=1, bitorder="little")
    codes = b[:, 2:66].astype(np.uint16) | (ninth.astype(np.uint16) << 8)
    scale = _half(b, 0) * (1 + 2 * _nibble_scales(b[:, 106:]))
    return _scaled(scale, _signed(grid("IQ3_S")[codes], b[:, 74:106]))


def _shifted(scale: Floats, codes: Words, negative: NDArray[np.bool_]) -> Floats:
    """IQ1: scales [n, groups] times (points of the codes [n, 32] plus or minus delta, a sign per code)."""
    delta = np.where(negative, -_DELTA, _DELTA)
    return _scaled(scale, (grid("IQ1_S")[codes] + delta[:, :, None]).reshape(len(codes), -1))


def _iq1_s(b: Bytes) -> Floats:
    words = _words(b[:, 34:])
    high = ((words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7).reshape(len(b), 32)
    codes: Words = (b[:, 2:34] | (high << 8)).astype(np.uint16)
    scale = _half(b, 0) * (2 * ((words >> 12) & 7) + 1).astype(np.float32)
    return _shifted(scale, codes, np.repeat(words >> 15, 4, axis=1).astype(bool))


def spread_half(b: Bytes) -> NDArray[np.float16]:
    """The FP16 scale of IQ1_M blocks [n, 56], float16 [n, 1]: four bits of it end each of the last four words."""
    words = _words(b[:, 48:]) >> 12
    bits = words[:, 0] | (words[:, 1] << 4) | (words[:, 2] << 8) | (words[:, 3] << 12)
    return bits.astype("<u2").view("<f2")[:, None]


def _iq1_m(b: Bytes) -> Floats:
    high = np.stack([b[:, 32:48] & 15, b[:, 32:48] >> 4], axis=2).reshape(len(b), 32)
    codes: Words = b[:, :32].astype(np.uint16) | ((high & 7).astype(np.uint16) << np.uint16(8))
    fields = (_words(b[:, 48:])[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    scale = spread_half(b).astype(np.float32) * (2 * fields.reshape(len(b), 16) + 1).astype(np.float32)
    return _shifted(scale, codes, (high & 8).astype(bool))


DEQUANTIZE: dict[str, Callable[[Bytes], Floats]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
"""Of each type the values of its blocks."""
