"""A kernel of a few lines in a source tree of its own, so that tests need no real one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epjit.runtime.kernel import KernelConfig

SCALE = """\
#include "epjit/types.cuh"
#include "toy/factor.cuh"
namespace epjit {
struct ScaleConfig { int32_t num_warps; bool twice; };
struct ScaleParams {
  const float* x;       // [num]; a comment; with semicolons
  uint64_t peers[kMaxPeers];  // of each rank
  int32_t num;
  float factor;
  bool wide;
  int64_t stamp;
};
constexpr int scale_threads(ScaleConfig config) { return config.num_warps * 32; }
constexpr int scale_shared_bytes(ScaleConfig config) { return config.twice ? 512 : 0; }
template <ScaleConfig kCfg>
__device__ void scale(const ScaleParams& p) {
  for (int i = threadIdx.x; i < p.num; i += blockDim.x)
    reinterpret_cast<float*>(p.peers[0])[i] = p.x[i] * kFactor * (kCfg.twice ? 2 : 1);
}
}  // namespace epjit
"""


def write_tree(root: Path) -> Path:
    """Writes the sources below `root` and returns it."""
    types = """\
#pragma once
using int32_t = int; using int64_t = long long; using uint64_t = unsigned long long;
constexpr int kMaxPeers = 4;
#ifdef EPJIT_EMULATE
#include "not_here.h"
#endif
"""
    factor = '#pragma once\n#include "epjit/types.cuh"\nconstexpr float kFactor = 3;\n'
    files = {"epjit/types.cuh": types, "toy/factor.cuh": factor, "toy/scale.cu": SCALE}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class ScaleConfig(KernelConfig, source="toy/scale.cu", tag="toy_w{0.num_warps}"):
    num_warps: int = 2
    twice: bool = True

    @property
    def shared_bytes(self) -> int:
        return 512 if self.twice else 0
