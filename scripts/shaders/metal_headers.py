#!/usr/bin/env python3
"""metal_headers.py FOLDER: writes a stand-in for Metal's standard library, with which clang can check the names and types of the MSL that naga
writes for compute kernels. What it cannot check: address spaces, and everything that Apple's compiler does after types.
"""
import itertools
import os
import sys

SCALARS = ["float", "half", "int", "uint", "short", "ushort", "char", "uchar", "long", "ulong", "bool"]
COMPONENTS = "xyzw"

HEAD = """#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#define kernel
#define device
#define constant const
#define threadgroup
#define thread

using half = _Float16;
using uint = unsigned;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;

namespace metal {
using ::half; using ::uint; using ::ushort; using ::uchar; using ::ulong;

template <class T, int N> struct vec;
template <class T> constexpr bool is_scalar = std::is_arithmetic<T>::value || std::is_same<T, half>::value;
template <class T> using if_scalar = std::enable_if_t<is_scalar<T>>;
"""

# Functions of the library that kernels can meet, with what they take. Nothing runs: they return what has the right type.
FUNCTIONS = """
template <class T> using same = T;
template <class T, class U> struct with_element { using type = U; };
template <class T, int N, class U> struct with_element<vec<T, N>, U> { using type = vec<U, N>; };

template <class T, int N> T dot(vec<T, N> a, vec<T, N>) { return a.e[0]; }
template <class T, int N> T length(vec<T, N> a) { return a.e[0]; }
template <class T, int N> T distance(vec<T, N> a, vec<T, N>) { return a.e[0]; }
template <class T, int N> vec<T, N> normalize(vec<T, N> a) { return a; }
template <class T> vec<T, 3> cross(vec<T, 3> a, vec<T, 3>) { return a; }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> vec<T, N> select(vec<T, N> a, vec<T, N>, vec<bool, N>) { return a; }
template <class T> typename with_element<T, bool>::type isnan(T) { return {}; }
template <class T> typename with_element<T, bool>::type isinf(T) { return {}; }
template <int N> bool all(vec<bool, N> a) { return a.e[0]; }
template <int N> bool any(vec<bool, N> a) { return a.e[0]; }
inline bool all(bool a) { return a; }
inline bool any(bool a) { return a; }
template <class T> T extract_bits(T a, uint, uint) { return a; }
template <class T> T insert_bits(T a, T, uint, uint) { return a; }

inline float2 unpack_unorm2x16_to_float(uint) { return {}; }
inline float2 unpack_snorm2x16_to_float(uint) { return {}; }
inline float4 unpack_unorm4x8_to_float(uint) { return {}; }
inline float4 unpack_snorm4x8_to_float(uint) { return {}; }
inline uint pack_float_to_unorm2x16(float2) { return 0; }
inline uint pack_float_to_snorm2x16(float2) { return 0; }
inline uint pack_float_to_unorm4x8(float4) { return 0; }
inline uint pack_float_to_snorm4x8(float4) { return 0; }

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags) { return a; }
inline void threadgroup_barrier(mem_flags) {}
inline void simdgroup_barrier(mem_flags) {}

enum memory_order { memory_order_relaxed };
template <class T> struct _atomic { T value; };
template <class T> using atomic = _atomic<T>;
using atomic_int = _atomic<int>;
using atomic_uint = _atomic<uint>;
template <class T, class U> T atomic_load_explicit(_atomic<T>* at, U) { return at->value; }
template <class T> void atomic_store_explicit(_atomic<T>* at, T value, memory_order) { at->value = value; }
template <class T> T atomic_exchange_explicit(_atomic<T>* at, T, memory_order) { return at->value; }
template <class T> bool atomic_compare_exchange_weak_explicit(_atomic<T>*, T*, T, memory_order, memory_order) { return true; }

struct simd_vote { ulong bits; explicit operator ulong() const { return bits; } };
inline simd_vote simd_ballot(bool) { return {}; }
inline bool simd_all(bool a) { return a; }
inline bool simd_any(bool a) { return a; }
inline bool simd_is_first() { return true; }
"""

TAIL = """
} // namespace metal
using namespace metal;

template <class T, class U> T as_type(U from) {
  static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
  T to;
  __builtin_memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(T));
  return to;
}
"""

OF_FLOATS = """acos asin atan ceil cos cosh exp exp2 floor fract log log2 rint round rsqrt saturate sign sin sinh sqrt tan tanh trunc
 acosh asinh atanh""".split()
OF_ANYTHING = ["abs"]
OF_INTEGERS = ["clz", "ctz", "popcount", "reverse_bits"]
SIMD_ONE = """simd_sum simd_product simd_max simd_min simd_and simd_or simd_xor simd_prefix_inclusive_sum simd_prefix_exclusive_sum
 simd_prefix_inclusive_product simd_prefix_exclusive_product simd_broadcast_first quad_broadcast_first""".split()
SIMD_LANE = "simd_shuffle simd_shuffle_xor simd_shuffle_up simd_shuffle_down simd_broadcast quad_broadcast quad_shuffle_xor".split()


def vector(n):
    """A vector: components and swizzles are properties, as clang knows them with -fdeclspec."""
    names = COMPONENTS[:n]
    lines = [
        f"template <class T> struct vec<T, {n}> {{",
        f"  T e[{n}];",
        "  vec() = default;",
        f"  template <class U, class = if_scalar<U>> vec(U all) {{ for (T& one : e) one = T(all); }}",
        f"  template <class U> explicit vec(vec<U, {n}> from) {{ for (int i = 0; i < {n}; i++) e[i] = T(from.e[i]); }}",
        f"  vec({', '.join(f'T {c}_' for c in names)}) : e{{{', '.join(f'{c}_' for c in names)}}} {{}}",
        "  T& operator[](uint i) { return e[i]; }",
        "  const T& operator[](uint i) const { return e[i]; }",
    ]
    if n == 3:
        lines += ["  vec(vec<T, 2> a, T b) : e{a.e[0], a.e[1], b} {}", "  vec(T a, vec<T, 2> b) : e{a, b.e[0], b.e[1]} {}"]
    if n == 4:
        lines += [
            "  vec(vec<T, 3> a, T b) : e{a.e[0], a.e[1], a.e[2], b} {}",
            "  vec(T a, vec<T, 3> b) : e{a, b.e[0], b.e[1], b.e[2]} {}",
            "  vec(vec<T, 2> a, vec<T, 2> b) : e{a.e[0], a.e[1], b.e[0], b.e[1]} {}",
            "  vec(vec<T, 2> a, T b, T c) : e{a.e[0], a.e[1], b, c} {}",
        ]
    for i, name in enumerate(names):
        lines.append(f"  T get_{name}() const {{ return e[{i}]; }} void put_{name}(T v) {{ e[{i}] = v; }}")
        lines.append(f"  __declspec(property(get = get_{name}, put = put_{name})) T {name};")
    for count in (2, 3, 4):
        for chosen in itertools.product(range(n), repeat=count):
            name = "".join(COMPONENTS[i] for i in chosen)
            elements = ", ".join(f"e[{i}]" for i in chosen)
            lines.append(f"  vec<T, {count}> get_{name}() const {{ return vec<T, {count}>({elements}); }}")
            lines.append(f"  __declspec(property(get = get_{name})) vec<T, {count}> {name};")
    return lines + ["};"]


def operators():
    lines = []
    template = "template <class T, int N"
    for op in "+ - * / % & | ^ << >>".split():
        each = f"for (int i = 0; i < N; i++) a.e[i] = a.e[i] {op}"
        lines += [
            f"{template}> vec<T, N> operator{op}(vec<T, N> a, vec<T, N> b) {{ {each} b.e[i]; return a; }}",
            f"{template}, class S, class = if_scalar<S>> vec<T, N> operator{op}(vec<T, N> a, S b) {{ {each} T(b); return a; }}",
            f"{template}, class S, class = if_scalar<S>> vec<T, N> operator{op}(S a, vec<T, N> b) {{ return vec<T, N>(a) {op} b; }}",
            f"{template}, class U> vec<T, N>& operator{op}=(vec<T, N>& a, U b) {{ a = a {op} b; return a; }}",
        ]
    for op in "== != < > <= >=".split():
        lines.append(f"{template}> vec<bool, N> operator{op}(vec<T, N> a, vec<T, N> b) "
                     f"{{ vec<bool, N> r; for (int i = 0; i < N; i++) r.e[i] = a.e[i] {op} b.e[i]; return r; }}")
    for op, result in (("-", "T"), ("~", "T"), ("!", "bool")):
        lines.append(f"{template}> vec<{result}, N> operator{op}(vec<T, N> a) "
                     f"{{ vec<{result}, N> r; for (int i = 0; i < N; i++) r.e[i] = {op}a.e[i]; return r; }}")
    return lines


def packed():
    """Vectors without padding, as they lie in buffers."""
    lines = []
    for scalar, n in [(s, 3) for s in ("float", "half", "int", "uint")] + [(s, n) for s in ("char", "uchar", "short", "ushort") for n in (2, 4)]:
        name, wide = f"packed_{scalar}{n}", f"vec<{scalar}, {n}>"
        elements = ", ".join(f"e[{i}]" for i in range(n))
        lines += [
            f"struct {name} {{ {scalar} e[{n}]; {name}() = default; {name}({wide} v) {{ for (int i = 0; i < {n}; i++) e[i] = v.e[i]; }}",
            f"  operator {wide}() const {{ return {wide}({elements}); }}",
            f"  {scalar}& operator[](uint i) {{ return e[i]; }} const {scalar}& operator[](uint i) const {{ return e[i]; }} }};",
        ]
    return lines


def matrices():
    lines = []
    for scalar in ("float", "half"):
        for columns, rows in itertools.product((2, 3, 4), repeat=2):
            name, column, turned = f"{scalar}{columns}x{rows}", f"{scalar}{rows}", f"{scalar}{rows}x{columns}"
            given = ", ".join(f"{column} c{i}" for i in range(columns))
            lines += [
                f"struct {turned};" if turned != name else "",
                f"struct {name} {{ {column} c[{columns}]; {name}() = default;",
                f"  {name}({given}) : c{{{', '.join(f'c{i}' for i in range(columns))}}} {{}}",
                f"  {column}& operator[](uint i) {{ return c[i]; }} const {column}& operator[](uint i) const {{ return c[i]; }} }};",
                f"inline {name} operator+({name} a, {name}) {{ return a; }} inline {name} operator-({name} a, {name}) {{ return a; }}",
                f"inline {name} operator*({name} a, {scalar}) {{ return a; }} inline {name} operator*({scalar}, {name} a) {{ return a; }}",
                f"inline {column} operator*({name} a, {scalar}{columns}) {{ return a.c[0]; }}",
                f"inline {scalar}{columns} operator*({column}, {name}) {{ return {{}}; }}",
            ]
        for columns, rows in itertools.product((2, 3, 4), repeat=2):
            lines.append(f"inline {scalar}{rows}x{columns} transpose({scalar}{columns}x{rows}) {{ return {{}}; }}")
        for columns, rows, more in itertools.product((2, 3, 4), repeat=3):
            left, right, both = (f"{scalar}{size}" for size in (f"{columns}x{rows}", f"{more}x{columns}", f"{more}x{rows}"))
            lines.append(f"inline {both} operator*({left}, {right}) {{ return {{}}; }}")
    return lines


def functions():
    lines = []
    floats = "class = std::enable_if_t<!std::is_integral<T>::value>"
    for name in OF_FLOATS:
        lines.append(f"template <class T, {floats}> T {name}(T x) {{ return x; }}")
    for name in OF_ANYTHING + OF_INTEGERS:
        lines.append(f"template <class T> T {name}(T x) {{ return x; }}")
    for name in ("min", "max"):
        lines.append(f"template <class T> T {name}(T a, T) {{ return a; }}")
    for name in ("pow", "fmod", "atan2", "step", "mulhi"):
        lines.append(f"template <class T> T {name}(T a, T) {{ return a; }}")
    for name in ("min", "max", "fmod"):
        lines.append(f"template <class T, int N> vec<T, N> {name}(vec<T, N> a, T) {{ return a; }}")
    for name in ("clamp", "mix", "fma", "smoothstep"):
        lines.append(f"template <class T> T {name}(T a, T, T) {{ return a; }}")
    lines.append("template <class T, int N> vec<T, N> clamp(vec<T, N> a, T, T) { return a; }")
    lines.append("template <class T, int N> vec<T, N> mix(vec<T, N> a, vec<T, N>, T) { return a; }")
    lines.append(FUNCTIONS)
    for name in "add sub and or xor min max".split():
        lines.append(f"template <class T> T atomic_fetch_{name}_explicit(_atomic<T>* at, T, memory_order) {{ return at->value; }}")
    lines += [f"template <class T> T {name}(T a) {{ return a; }}" for name in SIMD_ONE]
    lines += [f"template <class T> T {name}(T a, ushort) {{ return a; }}" for name in SIMD_LANE]
    return lines


def main():
    folder = sys.argv[1]
    os.makedirs(os.path.join(folder, "simd"), exist_ok=True)
    lines = [HEAD]
    for n in (2, 3, 4):
        lines += vector(n)
    lines += operators()
    lines += [f"using {scalar}{n} = vec<{scalar}, {n}>;" for scalar in SCALARS for n in (2, 3, 4)]
    lines += packed() + matrices() + functions() + [TAIL]
    lines += [f"using metal::{scalar}{n};" for scalar in SCALARS for n in (2, 3, 4)]
    for name, text in (("metal_stdlib", "\n".join(lines)), ("simd/simd.h", "#pragma once")):
        path = os.path.join(folder, name)
        # Never half a file: another check may be reading it.
        with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(file.name, path)


main()
