"""What the build of flash-attn for one GPU and a model's heads would compile."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools/gpu/flash_attn"
COMMAND = [sys.executable, str(TOOL)]
NAMES = [
    f"csrc/flash_attn/src/flash_{kind}_hdim{size}_{dtype}{causal}_sm80.cu"
    for kind in ("fwd", "bwd", "fwd_split")
    for size in (32, 64, 96, 128, 192, 256)
    for dtype in ("bf16", "fp16")
    for causal in ("", "_causal")
]
# The parts of flash-attn 2.8's sources that are changed.
SETUP = """
    # "-DFLASHATTENTION_DISABLE_DROPOUT",
    # "-DFLASHATTENTION_DISABLE_UNEVEN_K",
            sources=[
                "csrc/flash_attn/flash_api.cpp",
%s
            ],
            extra_compile_args={
                "cxx": compiler_c17_flag,
"""
HEADER = """#define BOOL_SWITCH(COND, CONST_NAME, ...) kept
#define FP16_SWITCH(COND, ...) theirs
#define HEADDIM_SWITCH(HEADDIM, ...) theirs
"""
# The choice by size, compiled: prints the instantiation for each size, or what is refused.
PROGRAM = """
#include <cstdio>
#include <initializer_list>
namespace cutlass { struct bfloat16_t {}; }
#define TORCH_CHECK(KEPT, TEXT) if (!(KEPT)) throw TEXT;
%s
int main() {
  for (int size : {8, 32, 40, 64, 96, 128, 200})
    try {
      FP16_SWITCH(size == 8, [&] {
        HEADDIM_SWITCH(size, [&] { std::printf("%%d as %%d\\n", size, kHeadDim); });
      });
    } catch (const char* text) { std::printf("%%d: %%s\\n", size, text); }
}
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A source archive of flash-attn."""
    source = tmp_path / "flash_attn-2.8.3"
    (source / "csrc/flash_attn/src").mkdir(parents=True)
    lines = "\n".join(f'                "{name}",' for name in NAMES)
    (source / "setup.py").write_text(SETUP % lines)
    (source / "csrc/flash_attn/src/static_switch.h").write_text(HEADER)
    packed = tmp_path / "flash_attn-2.8.3.tar.gz"
    with tarfile.open(packed, "w:gz") as made:
        made.add(source, source.name)
    return packed


def ran(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)


def test_a_dry_run_names_the_architecture_and_the_six_files_of_each_size(archive: Path) -> None:
    told = ran("--dry-run", "--arch", "90", "--head-sizes", "40,128", "--source", archive)
    assert told.returncode == 0, told.stderr
    first, *files = told.stdout.splitlines()
    assert "heads of [64, 128]" in first and "sm_90" in first and "13 files" in first
    assert files[0] == "csrc/flash_attn/flash_api.cpp" and len(files) == 1 + 2 * 6
    assert all("hdim64_bf16" in name or "hdim128_bf16" in name for name in files[1:])


def test_the_built_sizes_are_chosen_and_all_others_are_refused(
    archive: Path, tmp_path: Path
) -> None:
    tool = runpy.run_path(str(TOOL))
    source = tool["_unpacked"](archive, tmp_path / "unpacked")
    tool["_trim"](source, [32, 128])
    header = source / "csrc/flash_attn/src/static_switch.h"
    assert header.read_text().startswith("#define BOOL_SWITCH(COND, CONST_NAME, ...) kept\n")
    assert "theirs" not in header.read_text()
    program = tmp_path / "choice.cpp"
    program.write_text(PROGRAM % header.read_text())
    built = tmp_path / "choice"
    subprocess.run(["c++", "-std=c++17", program, "-o", built], check=True)
    told = subprocess.run([built], capture_output=True, text=True, check=True).stdout
    refused = "this flash-attn was built for heads of [32, 128] alone"
    assert told.splitlines() == [
        "8: this flash-attn was built for bf16 alone",
        *("32 as 32", f"40: {refused}", f"64: {refused}", f"96: {refused}", "128 as 128"),
        f"200: {refused}",
    ]
    setup = (source / "setup.py").read_text()
    assert '\n    "-DFLASHATTENTION_DISABLE_DROPOUT",' in setup
    assert '# "-DFLASHATTENTION_DISABLE_UNEVEN_K"' in setup
    assert "compiler_c17_flag + ['-DFLASHATTENTION_DISABLE_DROPOUT'" in setup


def test_without_a_gpu_the_architecture_has_to_be_given(archive: Path) -> None:
    told = ran("--dry-run", "--source", archive)
    if told.returncode:
        assert told.returncode == 2 and "--arch" in told.stderr and "Traceback" not in told.stderr


def test_a_size_of_heads_that_flash_attn_does_not_have_is_refused(archive: Path) -> None:
    told = ran("--dry-run", "--arch", "90", "--head-sizes", "64,288", "--source", archive)
    assert told.returncode == 2
    assert told.stderr == "flash_attn: --head-sizes: 1 to 256, found 288\n"
