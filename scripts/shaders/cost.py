#!/usr/bin/env python3
"""cost.py FOLDER [--all] [--markdown FILE]: what real GPUs' compilers make of the kernels in a folder (tests/suite/kernels/write.rs), without the GPUs.
Called by kernel_cost.sh, which says where the compilers are; check.py takes its check of AMD's compiler from here.
"""
import os
import sys
from collections import namedtuple

from kernels import Finding, in_parallel, must, pieces, read, texts

HERE = os.path.dirname(os.path.abspath(__file__))
ALLOWED = "scripts/shaders/kernel_cost_allowed.txt"

# How a driver calls what is printed. What counts as a spill: registers moved to memory or to other registers, memory of a thread's own.
Vendor = namedtuple("Vendor", "registers spills scratch occupancy occupancy_unit memory instructions cycles")
AMD = Vendor("VGPRs", ["Spilled VGPRs", "Spilled SGPRs"], "Scratch size", "Subgroups per SIMD", "waves/SIMD", "LDS size", "Instructions", "Inverse Throughput")
NVIDIA = Vendor("Number of GPRs", ["Spills to memory"], "SLM size", "Max warps/SM", "warps/SM", "", "Instruction count", "Static cycle count")
APPLE = Vendor("GPRs", ["Spills"], "Scratch", "Threads", "threads/core", "", "Instructions", "")
ADRENO = Vendor("Registers used", ["STP Count", "LDP Count"], "", "Max Waves Per Core", "waves/core", "", "Instruction Count", "")

# `reports` is part of the name that the driver gives the device: it is not asked for another. `mesa` is the variable of tools.sh with its folder.
Device = namedtuple("Device", "name title reports mesa vendor")
MESA, NEW_MESA = "MESA_FOLDER", "NEW_MESA_FOLDER"
EVERY_TIME = [
    Device("amd:vega10", "AMD Vega 10 (GCN 5)", "VEGA10", MESA, AMD),
    Device("amd:navi21", "AMD Navi 21 (RDNA 2)", "NAVI21", MESA, AMD),
    Device("amd:navi31", "AMD Navi 31 (RDNA 3)", "NAVI31", MESA, AMD),
]
ON_REQUEST = [
    Device("amd:gfx1201", "AMD GFX1201 (RDNA 4)", "GFX1201", NEW_MESA, AMD),
    # NVK gives the chip no name.
    Device("nvidia:162", "NVIDIA TU102 (Turing)", "NVK", NEW_MESA, NVIDIA),
    Device("nvidia:172", "NVIDIA GA102 (Ampere)", "NVK", NEW_MESA, NVIDIA),
    Device("apple:m1", "Apple M1", "Apple M1", NEW_MESA, APPLE),
    Device("adreno:740", "Qualcomm Adreno 740", "Adreno (TM) 740", NEW_MESA, ADRENO),
]


def statistics(folder, files, device):
    """What the device's compiler says of each SPIR-V file: {file: {statistic: value}}."""
    command = [os.path.join(HERE, "pretend_gpu.sh"), os.environ[device.mesa], device.name, os.environ["PIPELINE_STATISTICS"]]
    found = {file: {} for file in files}
    for output in in_parallel(lambda piece: must(command + piece, folder), pieces(files, 200)):
        for line in output.splitlines():
            file, statistic, value = line.split("\t")
            if file:
                found[file][statistic] = value
            elif device.reports not in value:
                raise SystemExit(f"{device.name}: the driver runs on `{value}`, not on `{device.reports}`")
    return found


def number(values, statistic):
    return int(float(values[statistic]))


def spilled(values, vendor):
    """What is wrong with a kernel on a device: {statistic: value}."""
    if "error" in values:
        return {"error": values["error"]}
    spills = [*vendor.spills, *([vendor.scratch] if vendor.scratch else [])]
    printed = [vendor.registers, vendor.occupancy, vendor.memory, vendor.instructions, vendor.cycles]
    # One that has another name in another version of the driver is not 0.
    missing = [name for name in [*spills, *printed] if name and name not in values]
    if missing:
        return {"error": f"the driver does not say `{'`, `'.join(missing)}`"}
    return {name: number(values, name) for name in spills if number(values, name)}


def said(wrong):
    return ", ".join(f"{value} {name}" for name, value in wrong.items())


class Allowed:
    """The kernels that may spill: lines of a kernel's file and entry point, the device, what may be more than 0, the reason."""

    def __init__(self):
        self.rows = {}
        with open(os.path.join(HERE, os.path.basename(ALLOWED)), encoding="utf-8") as rows:
            for line, row in enumerate(rows, 1):
                if row.strip() and not row.startswith("#"):
                    kernel, device, statistics_allowed, _reason = row.split(None, 3)
                    self.rows[kernel, device] = line, statistics_allowed.split(",")
        self.used = set()

    def allows(self, kernel, device, wrong):
        key = f"{kernel.place.split(':')[0]}::{kernel.entry}", device.name
        _line, names = self.rows.get(key, (0, []))
        if not all(name.replace(" ", "-") in names for name in wrong):
            return False
        self.used.add(key)
        return True

    def unused(self, devices):
        names = {device.name for device in devices}
        return [Finding(ALLOWED, line, "", f"{kernel} does not spill on {device}: remove the line")
                for (kernel, device), (line, _names) in self.rows.items() if device in names and (kernel, device) not in self.used]


# The tiles of eight rows of matmul.wgsl and of eight pairs of gated_experts.wgsl, which have four on GPUs.
TILES_OF_SOFTWARE = {"ROWS=8", "PAIRS=8"}


def of_gpus(kernels):
    """Without those that only software adapters are given: their tiles are made for a CPU's caches, not for a GPU's registers."""
    return [kernel for kernel in kernels if "_subgroup.wgsl" not in kernel.place and not TILES_OF_SOFTWARE & set(kernel.constants.split())]


def amd(folder, kernels):
    """No kernel spills on AMD's GPUs at any tile, in any form, save those that are allowed to."""
    allowed = Allowed()
    kernels = of_gpus(kernels)
    files = texts(kernels, "trusted")
    findings = []
    for device in EVERY_TIME:
        found = statistics(folder, files, device)
        for kernel in kernels:
            wrong = spilled(found[kernel.trusted], device.vendor) if kernel.trusted != "-" else {}
            if wrong and not allowed.allows(kernel, device, wrong):
                findings.append(Finding(kernel.trusted, 0, "", f"{device.name}: {said(wrong)} ({kernel.constants or 'default tile'})"))
    # The kernels with faults are not those of the list.
    if not folder.endswith("faults"):
        findings += allowed.unused(EVERY_TIME)
    return len(files) * len(EVERY_TIME), findings


def in_table(kernels):
    """Each entry point once, with the constants that its file gives: in 32 bits, or in packed halves if it is launched with halves alone."""
    at_default = [kernel for kernel in of_gpus(kernels) if not kernel.constants and kernel.trusted != "-"]
    in_32_bits = {(kernel.place, kernel.entry) for kernel in at_default if kernel.form == "f32"}
    packed = {}
    for kernel in at_default:
        if kernel.form == "packed" and (kernel.place, kernel.entry) not in in_32_bits:
            packed.setdefault((kernel.place, kernel.entry), kernel)
    return [kernel for kernel in at_default if kernel.form == "f32" or packed.get((kernel.place, kernel.entry)) is kernel]


def rows(folder, kernels, device):
    """A row of the table for each kernel, and the kernels that spill."""
    found = statistics(folder, texts(kernels, "trusted"), device)
    table, wrong = [], []
    for kernel in kernels:
        values, vendor = found[kernel.trusted], device.vendor
        spills_found = spilled(values, vendor)
        if spills_found:
            wrong.append((kernel, spills_found))
        if "error" in spills_found:
            continue
        spills = sum(number(values, name) for name in vendor.spills)
        table.append([
            f"{os.path.basename(kernel.place).split('.')[0]} `{kernel.entry}`{'' if kernel.form == 'f32' else ', packed halves'}",
            number(values, vendor.registers), spills, number(values, vendor.scratch) if vendor.scratch else "",
            number(values, vendor.occupancy), number(values, vendor.memory) if vendor.memory else "",
            number(values, vendor.instructions), number(values, vendor.cycles) if vendor.cycles else "",
        ])
    return table, wrong


def heading(device):
    return ["kernel", "registers", "spills", "scratch", device.vendor.occupancy_unit, "shared bytes", "instructions", "cycles"]


def columns_used(names, table):
    """Without the columns that this driver says nothing about."""
    kept = [column for column in range(len(names)) if any(row[column] != "" for row in table)]
    return [names[column] for column in kept], [[row[column] for column in kept] for row in table]


def plain(device, names, table):
    print(f"\n{device.title}, Mesa {version(device)}")
    widths = [max(len(str(cell)) for cell in column) for column in zip(names, *table)]
    for row in [names, *table]:
        print("  ".join(str(cell).ljust(width) if place == 0 else str(cell).rjust(width)
                        for place, (cell, width) in enumerate(zip(row, widths))))


def markdown(device, names, table):
    lines = [f"\n### {device.title}, Mesa {version(device)}\n", f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in table]
    return "\n".join(lines) + "\n"


def version(device):
    with open(os.path.join(os.environ[device.mesa], "version"), encoding="utf-8") as file:
        return file.read().split("-")[0]


def main():
    arguments = sys.argv[1:]
    folder = os.path.abspath(arguments.pop(0))
    everything = "--all" in arguments
    document = arguments[arguments.index("--markdown") + 1] if "--markdown" in arguments else None
    devices = EVERY_TIME + ON_REQUEST if everything else EVERY_TIME
    kernels = in_table(read(folder))
    allowed, failed, written = Allowed(), 0, ""
    for device in devices:
        table, wrong = rows(folder, kernels, device)
        names, table = columns_used(heading(device), table)
        if document:
            written += markdown(device, names, table)
        else:
            plain(device, names, table)
        for kernel, spills in wrong:
            if not allowed.allows(kernel, device, spills):
                failed += 1
                print(f"{kernel.place}: {device.name}: {kernel.entry}: {said(spills)}")
    for finding in allowed.unused([device for device in devices if device in ON_REQUEST]):
        failed += 1
        print(f"{finding.file}:{finding.line}: {finding.message}")
    if document:
        # Everything below the heading is this program's.
        with open(document, encoding="utf-8") as file:
            prose = file.read().split("\n## Tables\n")[0]
        with open(document, "w", encoding="utf-8") as file:
            file.write(f"{prose}\n## Tables\n{written}")
    print(f"\n{len(kernels)} entry points on {len(devices)} GPUs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
