#!/usr/bin/env python3
"""dxc_check.py LIBRARY < LIST: compiles HLSL with Microsoft's DXC and its DXIL validator, as wgpu calls them.

LIST has a line for each compilation: FILE<TAB>ENTRY<TAB>PROFILE<TAB>FLAGS. Prints FILE<TAB>LINE<TAB>ENTRY<TAB>MESSAGE for each failure.
"""
import ctypes
import os
import re
import sys
import uuid

# The compiler's COM interfaces (dxcapi.h): a method is called by its place in the table of the object that it belongs to.
CLSID_COMPILER = uuid.UUID("73e22d93-e6ce-47f3-b5bf-f0664f39c1b0")
IID_COMPILER3 = uuid.UUID("228b4687-5a6a-4730-900c-9702b2203f54")
IID_RESULT = uuid.UUID("58346cda-dde7-4497-9461-6f87af5e0659")
RELEASE, COMPILE = 2, 3
GET_STATUS, GET_ERRORS = 3, 5
BLOB_POINTER, BLOB_SIZE = 3, 4
UTF8 = 65001


class Buffer(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("size", ctypes.c_size_t), ("encoding", ctypes.c_uint32)]


def guid(value):
    return (ctypes.c_ubyte * 16).from_buffer_copy(value.bytes_le)


def call(thing, place, result, *arguments):
    table = ctypes.cast(thing, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    method = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *[type(argument) for argument in arguments])(table[place])
    return method(thing, *arguments)


def check(code, what):
    if code < 0:
        sys.exit(f"dxc_check.py: {what}: {code & 0xFFFFFFFF:#x}")


def pointer_to(thing):
    return ctypes.c_void_p(ctypes.addressof(thing))


class Compiler:
    def __init__(self, library):
        self.compiler = ctypes.c_void_p()
        create = ctypes.CDLL(library).DxcCreateInstance
        check(create(guid(CLSID_COMPILER), guid(IID_COMPILER3), ctypes.byref(self.compiler)), "DxcCreateInstance")

    def errors(self, text, arguments):
        """What the compiler and the validator say, or None if they accept the text."""
        data = ctypes.create_string_buffer(text, len(text))
        source = Buffer(ctypes.cast(data, ctypes.c_void_p), len(text), UTF8)
        words = (ctypes.c_wchar_p * len(arguments))(*arguments)
        iid, result = guid(IID_RESULT), ctypes.c_void_p()
        code = call(self.compiler, COMPILE, ctypes.c_int32, pointer_to(source), pointer_to(words),
                    ctypes.c_uint32(len(arguments)), ctypes.c_void_p(), pointer_to(iid), pointer_to(result))
        check(code, "Compile")
        status, blob = ctypes.c_int32(), ctypes.c_void_p()
        check(call(result, GET_STATUS, ctypes.c_int32, pointer_to(status)), "GetStatus")
        message = None
        if status.value != 0:
            check(call(result, GET_ERRORS, ctypes.c_int32, pointer_to(blob)), "GetErrorBuffer")
            message = "refused without a word"
            if blob.value:
                size = call(blob, BLOB_SIZE, ctypes.c_size_t)
                message = ctypes.string_at(call(blob, BLOB_POINTER, ctypes.c_void_p), size).rstrip(b"\0").decode(errors="replace")
                call(blob, RELEASE, ctypes.c_uint32)
        call(result, RELEASE, ctypes.c_uint32)
        return message


def main():
    compiler = Compiler(sys.argv[1])
    for row in sys.stdin:
        file, entry, profile, flags = row.rstrip("\n").split("\t")
        with open(file, "rb") as opened:
            text = opened.read()
        # The arguments of wgpu-hal, dx12/shader_compilation.rs; -Ges is DXC_ARG_ENABLE_STRICTNESS.
        arguments = [file, "-E", entry, "-T", profile, "-HV", "2018", "-no-warnings", "-Ges", *flags.split()]
        errors = compiler.errors(text, arguments)
        if errors is None:
            continue
        found = re.search(r":(\d+)(?::\d+)?: error: (.*)", errors)
        line, message = found.groups() if found else ("0", " ".join(errors.split()))
        print(file, line, entry, f"{profile}: {message}", sep="\t", flush=True)
    sys.stdout.flush()
    # The library's destructors crash at exit.
    os._exit(0)


main()
