#!/usr/bin/env python3
"""prove.py FOLDER FAULTS: proof that the gate finds faults. FOLDER has the kernels of FAULTS/*.wgsl, each with one fault, written as all kernels
are; check.py is run on it as on all kernels. A fault's file says what must be found: the line of the fault ends with `// fault: CHECK`, or its head
has `// fault at the entry point: CHECK` where the check sees a generated text, or names no line.

What naga makes of WGSL that it accepts is right SPIR-V, MSL and GLSL as far as we know: for those checks a generated text is damaged.
"""
import os
import re
import shutil
import subprocess
import sys

import check
import kernels

HERE = os.path.dirname(os.path.abspath(__file__))


def expected(path):
    """The start of the line that must be printed."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, 1):
        marked = re.search(r"// fault: (\S+)$", line)
        if marked:
            return f"{path}:{number}: {marked[1]}: "
        head = re.search(r"// fault at the entry point: (\S+)$", line)
        if head:
            entry = next(number for number, text in enumerate(lines, 1) if text.startswith("fn forward("))
            return f"{path}:{entry}: {head[1]}: "
    raise SystemExit(f"prove.py: {path} does not say which check finds its fault")


DAMAGES = [("trusted", check.spirv, b"\0\0\0\0"), ("metal_trusted", check.metal, b"float undeclared = nowhere;"),
           ("glsl_es", check.glsl_es, b"float undeclared = nowhere;")]


def undetected_damages(folder):
    """The columns of kernels.tsv whose check accepts a text that is spoilt."""
    copy = f"{folder}.damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    whole = [kernel for kernel in kernels.read(copy) if kernel.trusted != "-"]
    accepted = []
    for column, run, damage in DAMAGES:
        file = getattr(whole[0], column)
        with open(os.path.join(copy, file), "ab") as text:
            text.write(damage)
        if not any(finding.file == file for finding in run(copy, whole)[1]):
            accepted.append(column)
    return accepted


def main():
    folder, faults = sys.argv[1:]
    done = subprocess.run([sys.executable, os.path.join(HERE, "check.py"), folder], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="")
    paths = sorted(os.path.join(faults, name) for name in os.listdir(faults) if name.endswith(".wgsl"))
    missed = [start for start in map(expected, paths) if not any(line.startswith(start) for line in done.stdout.splitlines())]
    for start in missed:
        print(f"{start}NOT FOUND")
    if done.returncode != 1:
        missed.append("exit status")
        print(f"check.py ended with {done.returncode}, not with 1")
    accepted = undetected_damages(folder)
    for column in accepted:
        print(f"a damaged text passes: {column}")
    print(f"{len(paths) - len(missed)} of {len(paths)} faults found, {len(DAMAGES) - len(accepted)} of {len(DAMAGES)} damages")
    return 1 if missed or accepted or not paths else 0


sys.exit(main())
