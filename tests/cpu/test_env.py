"""Environment variables and the table of variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epjit import env
from epjit.arch import arch_name
from epjit.kernels import variants
from epjit.kernels.variants import CHOICES, Choice, Variant
from epjit.runtime import device

NAMES = {
    "EPJIT_CACHE_DIR",
    "EPJIT_TIMEOUT_SECONDS",
    "EPJIT_ASSERT_COMPILE",
    "EPJIT_DUMP",
    "EPJIT_CHECK",
    "EPJIT_DEEP_EP_V1",
    "EPJIT_PERMUTE_VARIANT",
    "EPJIT_BACKEND",
    "EPJIT_DISPATCH_VARIANT",
    "EPJIT_COMBINE_VARIANT",
    "EPJIT_DIRECT_BYTES",
    "EPJIT_LOW_LATENCY_DISPATCH_VARIANT",
    "EPJIT_LOW_LATENCY_COMBINE_VARIANT",
    "EPJIT_LOW_LATENCY_NUM_SMS",
    "DISABLE_SM90_FEATURES",
    "DISABLE_AGGRESSIVE_PTX_INSTRS",
    "TOPK_IDX_BITS",
    "EPJIT_TRANSPORT",
    "EPJIT_NVLINK_DOMAIN",
    "EPJIT_LOOPBACK_SEED",
    "NVSHMEM_DIR",
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_QP_DEPTH",
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "TORCH_CUDA_ARCH_LIST",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_table_is_whole() -> None:
    assert {variable.name for variable in env.VARIABLES} == NAMES
    assert all(variable.description.endswith(".") and variable.kind for variable in env.VARIABLES)
    assert all(variable() == variable.default for variable in env.VARIABLES)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (env.timeout_seconds, "2.5", 2.5),
        (env.timeout_seconds, "  ", 100.0),
        (env.assert_compile, "1", True),
        (env.assert_compile, "Off", False),
        (env.backend, "cpu", "cpu"),
        (env.topk_idx_bits, "32", 32),
        (env.transport, "loopback", "loopback"),
        (env.nvlink_domain, "4", 4),
        (env.loopback_seed, "0", 0),
        (env.nvshmem_ib_enable_ibgda, "1", True),
        (env.nvshmem_ib_enable_ibgda, "No", False),
        (env.dump, "~/x", Path.home() / "x"),
        (env.nvshmem_dir, "/opt/nvshmem", Path("/opt/nvshmem")),
        (env.torch_cuda_arch_list, "9.0;8.0+PTX", ("sm_90a", "sm_80")),
        (env.torch_cuda_arch_list, "7.5 8.0 9.0a 12.0+PTX", ("sm_80", "sm_90a", "sm_120a")),
        (env.torch_cuda_arch_list, "8.0;", ("sm_80",)),
        (env.torch_cuda_arch_list, "Hopper", ("sm_90a",)),
        (env.torch_cuda_arch_list, "Volta;Ampere Ada", ("sm_80", "sm_86", "sm_89")),
        (env.torch_cuda_arch_list, "Ampere+Tegra;9.0", ("sm_87", "sm_90a")),
        (env.torch_cuda_arch_list, "Blackwell", ("sm_100a", "sm_103a", "sm_120a", "sm_121a")),
        (env.torch_cuda_arch_list, "native", ()),
    ],
)
def test_values(
    variable: env.Variable[Any], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)  # read at the call, not at import
    assert variable() == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (env.timeout_seconds, "abc", "EPJIT_TIMEOUT_SECONDS='abc' is not a number greater than 0"),
        (env.timeout_seconds, "0", "EPJIT_TIMEOUT_SECONDS='0' is not a number greater than 0"),
        (env.timeout_seconds, "nan", "EPJIT_TIMEOUT_SECONDS='nan' is not a number"),
        (env.timeout_seconds, "inf", "EPJIT_TIMEOUT_SECONDS='inf' is not a number"),
        (env.assert_compile, "maybe", "EPJIT_ASSERT_COMPILE='maybe' is not a flag: 1, true"),
        (env.backend, "gpu", "EPJIT_BACKEND='gpu' is not 'auto', 'cuda' or 'cpu'"),
        (env.transport, "ucx", "EPJIT_TRANSPORT='ucx' is not 'auto', 'nvshmem' or 'loopback'"),
        (env.nvlink_domain, "-1", "EPJIT_NVLINK_DOMAIN='-1' is not a whole number, 0 or more"),
        (env.loopback_seed, "-1", "EPJIT_LOOPBACK_SEED='-1' is not a whole number, 0 or more"),
        (env.topk_idx_bits, "16", "TOPK_IDX_BITS='16' is not '64' or '32'"),
        (env.nvshmem_ib_enable_ibgda, "off", "NVSHMEM_IB_ENABLE_IBGDA='off' is not a flag: 1, tru"),
        (env.timeout_seconds, "1e10", "EPJIT_TIMEOUT_SECONDS='1e10' is not a number greater than"),
        (env.torch_cuda_arch_list, "hoppr", "TORCH_CUDA_ARCH_LIST='hoppr' is not a list such"),
    ],
)
def test_malformed_values(
    variable: env.Variable[Any], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError, match="is not") as caught:
        variable()
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["1", "true", "yes", "on", "0", "False", "no", "NO"])
def test_nvshmem_reads_a_flag_alike(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", text)
    assert env.nvshmem_ib_enable_ibgda() == env.nvshmem_flag(
        "NVSHMEM_IB_ENABLE_IBGDA", default=False
    )


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    monkeypatch.setenv("NVSHMEM_IB_TIMEOUT", "")  # unset for epjit, and 0 for NVSHMEM
    env.set_default("NVSHMEM_IB_SL", "1")
    env.set_default("NVSHMEM_IB_TIMEOUT", "16")
    assert (env.foreign("NVSHMEM_IB_SL"), env.foreign("NVSHMEM_IB_TIMEOUT")) == ("3", "16")


def test_arch_names_and_limits() -> None:
    assert [arch_name(*arch) for arch in ((8, 0), (9, 0), (12, 1))] == [
        "sm_80",
        "sm_90a",
        "sm_121a",
    ]
    assert device.shared_limit("sm_90a") == device.shared_limit("sm_90") == 227 * 1024
    with pytest.raises(ValueError, match="shared memory of sm_70 is not known"):
        device.shared_limit("sm_70")
    with pytest.raises(ValueError, match=r"arch is '9\.0'"):
        device.shared_limit("9.0")


# ---- variants


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPJIT_TOY_VARIANT", raising=False)
    variable = env.Variable("EPJIT_TOY_VARIANT", "a name", "auto", "Implementation of toy.", str)
    known = (Variant("fast", 90, "bulk copies"), Variant("plain", 80, "loads and stores"))
    monkeypatch.setattr(variants, "CHOICES", {"toy": Choice(variable, known)})


@pytest.mark.usefixtures("toy")
def test_auto_takes_the_first_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variants.names("toy", "sm_90a") == ("fast", "plain")
    assert variants.names("toy", "sm_89") == ("plain",)
    assert variants.resolve("toy", "sm_90a") == "fast"
    assert variants.resolve("toy", "sm_120a") == "fast"
    assert variants.resolve("toy", "sm_89") == "plain"
    monkeypatch.setenv("EPJIT_TOY_VARIANT", "plain")
    assert variants.resolve("toy", "sm_90a") == "plain"
    monkeypatch.setenv("EPJIT_TOY_VARIANT", "auto")
    monkeypatch.setenv("DISABLE_SM90_FEATURES", "1")
    assert variants.resolve("toy", "sm_90a") == "plain"


@pytest.mark.usefixtures("toy")
def test_unknown_variant_lists_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TOY_VARIANT", "quick")
    with pytest.raises(
        ValueError, match=r"EPJIT_TOY_VARIANT='quick' .* valid are auto, fast, plain"
    ):
        variants.resolve("toy", "sm_90a")


@pytest.mark.usefixtures("toy")
def test_variant_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_TOY_VARIANT", "fast")
    with pytest.raises(ValueError, match="'fast' needs sm_90 or later; the device is sm_89"):
        variants.resolve("toy", "sm_89")
    monkeypatch.setenv("DISABLE_SM90_FEATURES", "1")
    with pytest.raises(ValueError, match="DISABLE_SM90_FEATURES=1 excludes"):
        variants.resolve("toy", "sm_90a")
    monkeypatch.delenv("EPJIT_TOY_VARIANT")
    with pytest.raises(ValueError, match=r"no variant that sm_75 can run; it has fast, plain"):
        variants.resolve("toy", "sm_75")


def test_lines_are_for_gpus_with_nvlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPJIT_LOW_LATENCY_DISPATCH_VARIANT", "lines")
    assert variants.resolve("low_latency_dispatch", "sm_103a") == "lines"
    with pytest.raises(ValueError, match="'lines' needs sm_90 and before sm_120; the device is"):
        variants.resolve("low_latency_dispatch", "sm_120a")


@pytest.mark.parametrize("op", CHOICES)
def test_every_variant_is_described_where_it_is_chosen(op: str) -> None:
    """Names are unique, and the variable's description, from which the docs come, lists them."""
    choice = CHOICES[op]
    assert len(set(choice.allowed)) == len(choice.allowed)
    assert choice.variable in env.VARIABLES
    assert choice.variable.name == f"EPJIT_{op.upper()}_VARIANT"
    *most, last = choice.allowed
    assert choice.variable.description.endswith(f": {', '.join(most)} or {last}.")
