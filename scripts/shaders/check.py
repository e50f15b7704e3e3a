#!/usr/bin/env python3
"""check.py FOLDER: gives the kernels in a folder (tests/suite/kernels/write.rs) to every compiler that judges them, and prints a line for each
failure: PATH:LINE of the repository, the check, the entry point, the message, and the generated text that it is about. Called by check_shaders.sh,
which says where the compilers are.
"""
import os
import re
import sys
import time

import cost
from kernels import Finding, in_parallel, must, pieces, read, run, texts

HERE = os.path.dirname(os.path.abspath(__file__))


def tab_separated(output):
    rows = (line.split("\t") for line in output.splitlines())
    return [Finding(file, int(line), entry, message) for file, line, entry, message in rows]


def tint(folder, kernels):
    output = must(["node", os.path.join(HERE, "tint_check.js"), os.path.join(folder, "kernels.tsv")], folder)
    *findings, judged = output.splitlines()
    expected = len({(kernel.wgsl, kernel.entry, kernel.constants) for kernel in kernels})
    if judged != str(expected):
        raise SystemExit(f"tint_check.js judged {judged} kernels of {expected}")
    return expected, tab_separated("\n".join(findings))


def spirv(folder, kernels):
    """As wgpu hands it to a driver of Vulkan 1.3, and with checks to one of Vulkan 1.1."""
    files = [(file, "vulkan1.3") for file in texts(kernels, "trusted", "checked")]
    files += [(file, "vulkan1.1") for file in texts(kernels, "old_checked")]

    def validate(job):
        file, environment = job
        status, output, complaint = run(["spirv-val", "--target-env", environment, file], folder)
        message = " ".join((complaint or output).split())
        return [] if status == 0 else [Finding(file, 0, "", f"{environment}: {message}")]

    found = in_parallel(validate, files)
    return len(files), [finding for one in found for finding in one]


def dxc(folder, kernels):
    """All without runtime checks, with the newest shader model that this DXC has, as wgpu asks for; those in 32 bits with the oldest as well, whose
    GPUs have no 16-bit types. With runtime checks each entry point at its default tile: zeroing workgroup memory takes DXC up to a second.
    """
    jobs = set()
    newest, oldest = "cs_6_8\t-enable-16bit-types", "cs_6_0\t"
    for kernel in kernels:
        wanted = [(kernel.hlsl_trusted, newest)]
        if kernel.form == "f32":
            wanted.append((kernel.hlsl_trusted, oldest))
        if not kernel.constants:
            wanted.append((kernel.hlsl_checked, newest))
        jobs |= {f"{file}\t{kernel.entry}\t{profile}\n" for file, profile in wanted if file != "-"}

    def compile_all(piece):
        script = os.path.join(HERE, "dxc_check.py")
        return tab_separated(must([sys.executable, script, os.environ["DXC_LIBRARY"]], folder, "".join(piece)))

    found = in_parallel(compile_all, pieces(sorted(jobs), 200))
    return len(jobs), [finding for one in found for finding in one]


def metal(folder, kernels):
    """The types of a few hundred texts in one go, each in a namespace of its own."""
    files = texts(kernels, "metal_trusted", "metal_checked")
    # A number without a suffix is a float in MSL. naga declares arrays of unknown length with one element.
    command = ["clang++-14", "-x", "c++", "-std=c++17", "-fdeclspec", "-fsyntax-only", "-mavx512fp16", "-ferror-limit=0", "-Xclang",
               "-cl-single-precision-constant", "-Wno-unknown-attributes", "-Wno-array-bounds", "-I", os.environ["METAL_HEADERS"], "-I", folder, "-"]

    def check(piece):
        lines = ["#include <metal_stdlib>", "#include <simd/simd.h>"]
        for number, file in enumerate(piece):
            lines += [f"namespace text{number} {{", f'#include "{file}"', "}"]
        status, _, complaint = run(command, folder, "\n".join(lines))
        found = re.findall(r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$", complaint, re.MULTILINE)
        if status != 0 and not found:
            raise SystemExit(f"clang++-14: exit status {status}: {complaint[-500:]}")
        return [Finding(os.path.basename(file), int(line), "", message) for file, line, message in found]

    found = in_parallel(check, pieces(files, 200))
    return len(files), [finding for one in found for finding in one]


def glsl_es(folder, kernels):
    files = texts(kernels, "glsl_es")

    def check(piece):
        status, output, complaint = run(["glslangValidator", "-S", "comp", *piece], folder)
        file, found = "", []
        # It prints the name of a file, then what is wrong with it.
        for line in output.splitlines():
            if line in piece:
                file = line
            error = re.match(r"ERROR: \S+?:(\d+): (.*)", line)
            if error:
                found.append(Finding(file, int(error[1]), "", error[2]))
        if status != 0 and not found:
            raise SystemExit(f"glslangValidator: exit status {status}: {(output + complaint)[-500:]}")
        return found

    found = in_parallel(check, pieces(files, 100))
    return len(files), [finding for one in found for finding in one]


CHECKS = [("tint", tint), ("spirv-val", spirv), ("dxc", dxc), ("metal", metal), ("glsl-es", glsl_es), ("amd", cost.amd)]


class Report:
    """Says where in the repository a finding is, and prints it, each once."""

    def __init__(self, folder, kernels):
        self.folder = folder
        self.owners = {}
        for kernel in kernels:
            for file in kernel[6:]:
                self.owners.setdefault(file, kernel)
        self.places = {(kernel.wgsl, kernel.entry): kernel.place for kernel in kernels}
        self.lines = {}

    def origin(self, finding):
        if finding.file in self.owners:
            return self.owners[finding.file].place
        # A text that was not generated, or a WGSL file.
        path = os.path.join(self.folder, f"{finding.file}.lines")
        if not os.path.exists(path):
            return f"{finding.file}:{finding.line}"
        if path not in self.lines:
            with open(path, encoding="utf-8") as lines:
                self.lines[path] = lines.read().split("\n")
        lines = self.lines[path]
        if 0 < finding.line <= len(lines):
            return lines[finding.line - 1]
        # Tint names the entry point of a pipeline, not a line.
        return self.places[finding.file, finding.entry]

    def print(self, check, findings):
        printed = set()
        for finding in findings:
            owner = self.owners.get(finding.file)
            entry = finding.entry or (owner.entry if owner else "")
            line = f"{self.origin(finding)}: {check}: {entry + ': ' if entry else ''}{finding.message}"
            if line in printed:
                continue
            printed.add(line)
            where = f"{os.path.join(self.folder, finding.file)}:{finding.line}" if owner else ""
            print(f"{line} [{where}]" if where else line)
        return len(printed)


def main():
    folder = os.path.abspath(sys.argv[1])
    kernels = read(folder)
    report = Report(folder, kernels)
    rows = []
    with open(os.path.join(folder, "findings.tsv"), encoding="utf-8") as table:
        naga = [line.rstrip("\n").split("\t") for line in table]
    for place, message in naga:
        print(f"{place}: naga: {message}")
    # Its time went into the writing of the folder.
    rows.append(("naga", len(kernels), len(naga), None))
    for name, check in CHECKS:
        start = time.monotonic()
        count, findings = check(folder, kernels)
        failed = report.print(name, findings)
        rows.append((name, count, failed, time.monotonic() - start))
        sys.stdout.flush()
    print(f"\n{'check':<12}{'texts':>8}{'failed':>8}{'seconds':>9}")
    for name, count, failed, seconds in rows:
        print(f"{name:<12}{count:>8}{failed:>8}" + ("" if seconds is None else f"{seconds:>9.1f}"))
    idle = [name for name, count, _, _ in rows if count == 0]
    if idle:
        print(f"nothing to check for: {', '.join(idle)}")
    return 1 if idle or any(failed for _, _, failed, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
