"""Build the emulated CANN for the torch_npu wheel of this interpreter, once, into a cache folder.

Needs g++ and nm. The wheel links against seven libraries, and older ones look for an eighth. Those functions that have
something to answer are written in ``cann/``, every other symbol becomes a function that returns 0. Nothing here imports
torch, which fails as long as torch_npu is installed and no CANN is found.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cann"
EMPTY = ("libhccl", "libge_runner", "libgraph", "libacl_tdt_channel", "libatb", "libopapi")
"""Libraries that a wheel names but of which all symbols are found in libascendcl, or none are needed."""
SYSTEM = ("libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1")
LOADER = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
NOT_CANN = ("Py", "_Py", "_ITM", "__gmon", "_ZTH")
"""Starts of symbols that the interpreter brings, or that may stay undefined."""
FALLBACK = "libnpu_emulator.so"


def package(name: str) -> Path:
    """Find an installed package without importing it.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{sys.executable} has no {name}: pip install torch==2.13.0 torch-npu==2.13.0")
    return Path(spec.submodule_search_locations[0])


def folder() -> Path:
    """Return where the build for this interpreter, these wheels and these sources belongs."""
    key = hashlib.sha256(sysconfig.get_platform().encode())
    for name in ("torch", "torch_npu"):
        key.update(f"{package(name)} {importlib.metadata.version(name)}\n".encode())
    for source in (Path(__file__), *sorted(SOURCES.iterdir())):
        key.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "npu-emulator" / key.hexdigest()[:16]


def ready() -> Path:
    """Return the folder with the libraries; build them if they are not there.

    Raises:
        SystemExit: a tool or a wheel is missing, or the compiler fails.
    """
    out = folder()
    if out.is_dir():
        return out
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"building the emulated CANN needs {' and '.join(missing)}")
    print(f"building the emulated CANN in {out}, once", file=sys.stderr, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent))
    try:
        _build(made)
        try:
            made.rename(out)
        except OSError:  # another process was faster
            assert out.is_dir()
    except subprocess.CalledProcessError as fault:
        raise SystemExit(f"the compiler failed: {' '.join(fault.cmd)}") from fault
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out


def _build(out: Path) -> None:
    torch, torch_npu = package("torch"), package("torch_npu")
    acl = [f"-I{torch_npu / 'include/third_party/acl/inc'}"]

    def library(name: str, *arguments: str | Path) -> Path:
        made = out / f"{name}.so"
        command = ["g++", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{made.name}", "-o", str(made)]
        subprocess.check_call([*command, *map(str, arguments)])
        return made

    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        fallback = pool.submit(library, FALLBACK[:-3], "-std=c++20", *include, SOURCES / "fallback.cpp", *link)
        compiler = library("libacl_op_compiler", *acl, SOURCES / "compiler.cpp")
        runtime = library("libascendcl", *acl, SOURCES / "runtime.cpp")
        written = _symbols(compiler, "--defined-only") | _symbols(runtime, "--defined-only")
        stubs = out / "stubs.c"
        names = sorted(_wanted(torch, torch_npu) - written)
        stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))
        compiled = out / "stubs.o"
        subprocess.check_call(["gcc", "-c", "-fPIC", "-fno-builtin", "-w", "-o", str(compiled), str(stubs)])
        library("libascendcl", *acl, SOURCES / "runtime.cpp", compiled)
        for name in EMPTY:
            library(name, "-x", "c", "/dev/null")
        fallback.result()


def _wanted(torch: Path, torch_npu: Path) -> set[str]:
    """Return the symbols that the wheel needs and neither itself, torch nor the system brings."""
    wheel = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    machine = sysconfig.get_platform().rsplit("-", 1)[-1]
    brought = [*wheel, *torch.glob("lib/*.so"), *filter(None, map(_system_library, (*SYSTEM, LOADER[machine])))]
    needed = set().union(*(_symbols(library, "--undefined-only") for library in wheel))
    given = set().union(*(_symbols(library, "--defined-only") for library in brought))
    return {name for name in needed - given if not name.startswith(NOT_CANN)}


def _symbols(library: Path, which: str) -> set[str]:
    """Return the names that a library defines, or those that it needs, weak ones left out."""
    listing = subprocess.check_output(["nm", "-D", which, str(library)], text=True, stderr=subprocess.DEVNULL)
    rows = [line.split() for line in listing.splitlines()]
    return {row[-1].split("@")[0] for row in rows if which == "--defined-only" or row[-2] == "U"}


def _system_library(name: str) -> Path | None:
    """Ask the compiler where a system library lies."""
    found = Path(subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip())
    return found if found.is_absolute() and found.exists() else None
