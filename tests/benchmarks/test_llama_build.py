"""The benchmarks refuse a llama.cpp whose instructions are not those that our kernels use in the same run."""

import sys

import pytest

ZEN5 = {"avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"}
ZEN2 = {"avx2", "fma", "f16c", "bmi2"}
AVX2 = {"GGML_NATIVE": "OFF", "GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON"}
AVX512 = AVX2 | {"GGML_AVX512": "ON", "GGML_AVX512_BF16": "ON"}
NATIVE = {"GGML_NATIVE": "ON"}


@pytest.fixture
def llama_build(benchmarks, monkeypatch):
    module = benchmarks("llama_build")
    monkeypatch.setattr(module, "flags", lambda: ZEN5)
    return module


def build(folder, options):
    lines = [
        "# a comment",
        *(f"{name}:BOOL={value}" for name, value in options.items()),
        "CMAKE_C_FLAGS_DEBUG:STRING=-g",
    ]
    (folder / "CMakeCache.txt").write_text("\n".join(lines))
    (folder / "bin").mkdir()
    return folder / "bin"


@pytest.mark.parametrize(
    ("options", "avx2", "reason"),
    [
        (AVX2, True, None),
        (NATIVE, False, None),
        (NATIVE, True, "beyond AVX2; build it with -DGGML_NATIVE=OFF"),
        (AVX512, True, "GGML_AVX512, GGML_AVX512_BF16, which is beyond AVX2"),
        (AVX2, False, "without GGML_AVX512, GGML_AVX512_BF16, GGML_AVX512_VBMI, GGML_AVX512_VNNI, GGML_AVX_VNNI"),
        (AVX512, False, "without GGML_AVX512_VBMI"),
        (AVX2 | {"GGML_FMA": "OFF"}, True, "without GGML_FMA, which this processor has; build it with -DGGML_FMA=ON"),
        (AVX2 | {"CMAKE_CXX_FLAGS": "-O2 -march=native"}, True, "was built with -march=native"),
    ],
)
def test_a_build_is_a_peer_if_it_has_the_instructions_of_the_run(llama_build, tmp_path, options, avx2, reason):
    found = llama_build.why_not(build(tmp_path, options), avx2=avx2)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("avx2", [True, False])
@pytest.mark.parametrize("options", [AVX2, NATIVE])
def test_on_a_processor_that_ends_at_avx2_both_builds_are_peers(llama_build, monkeypatch, tmp_path, options, avx2):
    monkeypatch.setattr(llama_build, "flags", lambda: ZEN2)
    assert llama_build.why_not(build(tmp_path, options), avx2=avx2) is None


def test_a_folder_that_says_nothing_of_its_build_is_no_peer(llama_build, tmp_path):
    assert "is not there" in llama_build.why_not(tmp_path, avx2=False)


def test_both_programs_refuse_before_they_measure(llama_build, benchmarks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["all.py", "--avx2", "--llama", str(build(tmp_path, NATIVE))])
    with pytest.raises(SystemExit):
        benchmarks("all").main()
    assert "beyond AVX2" in capsys.readouterr().err
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setattr(sys, "argv", ["decode.py", "--llama", str(tmp_path / "bin")])
    with pytest.raises(SystemExit):
        benchmarks("decode").main()
    assert "beyond AVX2" in capsys.readouterr().err
