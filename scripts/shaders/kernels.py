"""What `RANKMIX_WRITE_KERNELS=FOLDER suite` wrote (tests/suite/kernels/write.rs), and how a list of files is given to a compiler in pieces."""
import concurrent.futures
import os
import subprocess
from collections import namedtuple

# The columns of kernels.tsv. From `trusted` on they are names of files, one for each text that a driver's compiler is given.
Kernel = namedtuple("Kernel", "wgsl entry constants form place name "
                    "trusted checked old_checked hlsl_trusted hlsl_checked metal_trusted metal_checked glsl_es")

# What a compiler finds wrong: in which file of the folder, in which line (0: it does not say), at which entry point.
Finding = namedtuple("Finding", "file line entry message")


def read(folder):
    with open(os.path.join(folder, "kernels.tsv"), encoding="utf-8") as table:
        return [Kernel(*row.rstrip("\n").split("\t")) for row in table]


def texts(kernels, *columns):
    """The files in these columns, each once."""
    found = {getattr(kernel, column) for kernel in kernels for column in columns}
    return sorted(found - {"-"})


def pieces(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def in_parallel(work, items):
    """work of each item, as many at a time as there are processors."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def run(command, folder, text=None):
    """The exit status, what was printed, and what was complained."""
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def must(command, folder, text=None):
    """What the command prints; ends the program if it fails."""
    status, output, complaint = run(command, folder, text)
    if status != 0:
        raise SystemExit(f"{os.path.basename(command[0])}: exit status {status}: {complaint.strip()[-500:]}")
    return output
