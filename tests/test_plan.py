"""Problem -> candidates -> config -> plan of the sm_90a GEMM: host logic, tested without a GPU."""

import random
import re
from itertools import pairwise

import pytest

from fastfp8 import _C
from fastfp8.backends import KERNELS

BLOCK, ROW = (128, 128), (1, 128)
SMS = 132
DENSE_TABLE = [(576, 7168), (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]


def pad4(n):
    return (n + 3) // 4 * 4


def view(dtype, sizes, strides, device=0, address=1 << 20):
    return _C.TensorView(dtype, sizes, strides, device, address)


def operands(m, n, k, b_block=BLOCK, c=None):
    """Views of tensors in the layouts that quantize makes."""
    blocks = (k + 127) // 128
    rows = (n + 127) // 128
    return {
        "a": view("float8_e4m3fn", [m, k], [k, 1]),
        "a_scale": view("float32", [m, blocks], [1, pad4(m)]),
        "b": view("float8_e4m3fn", [n, k], [k, 1]),
        "b_scale": view("float32", [rows, blocks], [blocks, 1])
        if b_block == BLOCK
        else view("float32", [n, blocks], [1, pad4(n)]),
        "b_block": b_block,
        "out_dtype": "bfloat16",
        "c": None if c is None else view(c, [m, n], [n, 1]),
        "num_sms": SMS,
    }


def problem(m, n, k, b_block=BLOCK, out_dtype="bfloat16", c=None, num_sms=SMS):
    return _C.GemmProblem(**{**operands(m, n, k, b_block, c), "out_dtype": out_dtype, "num_sms": num_sms})


def plan_of(p):
    return _C.gemm_plan(p, _C.gemm_select(p))


@pytest.mark.parametrize(("n", "k"), DENSE_TABLE)
@pytest.mark.parametrize("m", [1, 63, 64, 129, 1000, 4096])
def test_walk_covers_every_tile_once(m, n, k):
    for config, _ in _C.gemm_candidates(problem(m, n, k)):
        tiles_m, tiles_n = config.tiles
        rows = config.tile_m * (2 if config.name.endswith("pair") else 1)
        assert (tiles_m - 1) * rows < m <= tiles_m * rows
        assert (tiles_n - 1) * config.tile_n < n <= tiles_n * config.tile_n
        walk = [config.tile_at(i) for i in range(tiles_m * tiles_n)]
        assert sorted(walk) == [(i, j) for i in range(tiles_m) for j in range(tiles_n)]
        assert config.cluster == {"pair": 2, "split": config.segments}.get(config.name.split()[-1], 1)
        assert config.grid == min(SMS // config.cluster, tiles_m * tiles_n) * config.cluster


def test_walk_stays_in_a_band():
    """Consecutive tiles share a column of B until the band's rows are used up: that is what L2 reuse rests on."""
    config = _C.gemm_select(problem(8192, 7168, 2048))
    assert config.band > 1
    walk = [config.tile_at(i) for i in range(config.band * config.tiles[1])]
    assert {row for row, _ in walk} == set(range(config.band))
    same_column = sum(a[1] == b[1] for a, b in pairwise(walk))
    assert same_column == len(walk) - config.tiles[1]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("b_block", [BLOCK, ROW])
def test_shared_memory_fits_and_feeds_the_pipeline(b_block, out_dtype):
    p = problem(4096, 4096, 4096, b_block, out_dtype)
    for config, _ in _C.gemm_candidates(p):
        plan = _C.gemm_plan(p, config)
        scales = max(config.tile_m * 4, 128) + (config.tile_n * 4 if b_block == ROW else 0)
        scaler = b_block == BLOCK and config.tile_m == config.tile_n == 128  # a product a row, a barrier
        stage = (config.tile_m + config.tile_n) * config.tile_k + scales + 16 + scaler * (128 * 4 + 8)
        width = 4 if config.name.endswith("split") else 2 if out_dtype == "bfloat16" and config.tile_m >= 64 else 0
        staged = config.tile_m * min(config.tile_n, 128)  # a pass of columns at a time
        assert plan.shared_bytes == config.stages * stage + staged * width + 16
        assert plan.shared_bytes <= 227 * 1024
        assert config.stages >= 4
        assert config.stages == 8 or plan.shared_bytes + stage > 227 * 1024, "another stage would fit"


def test_select_takes_the_cheapest_that_is_not_rejected():
    for n, k in DENSE_TABLE:
        for m in (1, 64, 4096):
            p = problem(m, n, k)
            allowed = [config.cycles for config, rejected in _C.gemm_candidates(p) if not rejected]
            assert _C.gemm_select(p).cycles == min(allowed)


def reasons_of(p):
    return {config.name: rejected for config, rejected in _C.gemm_candidates(p)}


def config_of(p, name):
    return next(config for config, _ in _C.gemm_candidates(p) if config.name == name)


def test_select_rejects_tiles_past_n_with_a_reason():
    reasons = reasons_of(problem(64, 8, 128))
    assert reasons["64x64"] == ""
    assert "past N" in reasons["64x128"]
    assert "past M" in reasons["128x64"]
    assert "one segment" in reasons["64x64 split"]
    assert _C.gemm_select(problem(64, 8, 128)).name == "64x64"


def test_small_m_gets_small_tiles_and_a_split_where_n_is_small():
    """By the model: nine tiles of 64 columns would leave most SMs idle, so K is shared out among clusters of eight."""
    small, large = _C.gemm_select(problem(64, 576, 7168)), _C.gemm_select(problem(4096, 4096, 7168))
    assert (small.name, small.cluster, small.grid) == ("64x64 split", 8, 72)
    assert large.name == "128x256 pair"
    assert _C.gemm_select(problem(64, 7168, 16384)).tile_m == 64
    assert _C.gemm_select(problem(4096, 576, 7168)).name != "64x64 split", "one CTA takes all segments of a tile"


def test_the_model_has_every_term():
    """A change of the machine changes the terms that it should, and the largest of those that overlap counts."""
    given = operands(64, 7168, 2048)
    h100, h200, h20 = (_C.GemmProblem(**given, machine=name) for name in ("H100", "H200", "H20"))
    costs = [config_of(p, "64x128").cost for p in (h100, h200, h20)]
    overlapping = ("tensor", "consumer", "from_l2", "into_sm", "latency")
    for cost in costs:
        assert cost["block"] == max(cost[term] for term in overlapping)
        assert min(cost.values()) > 0
        assert cost["total"] >= cost["hbm"]
    assert costs[1]["hbm"] < costs[0]["hbm"]
    assert costs[2]["tensor"] == 4 * costs[0]["tensor"]
    narrow = config_of(h100, "64x64").cost["tensor"]
    assert narrow == 2 * 4 * (64 + 32) * 32 / 128, "two consumers, four wgmma each, bound by reading A and B"
    with pytest.raises(RuntimeError, match="knows H200, H20, H800, H100, not 'B200'"):
        _C.GemmProblem(**given, machine="B200")


def test_selection_depends_on_the_number_of_sms():
    few, many = problem(4096, 4096, 1024, num_sms=8), problem(4096, 4096, 1024, num_sms=132)
    assert _C.gemm_select(few).grid == 8
    assert _C.gemm_select(many).grid == 132


def test_plan_of_block_scales_and_bf16():
    p = problem(300, 264, 400)
    plan = _C.gemm_plan(p, config_of(p, "128x64"))
    assert (plan.module, plan.kernel) == ("gemm_block_bf16", "gemm_sm90_block_bf16_128x64")
    assert plan.overlaps
    assert (plan.block, plan.cluster, plan.grid) == ([384, 1, 1], [1, 1, 1], [3 * 5, 1, 1])
    a, b, a_scale, b_scale, out, *rest = plan.arguments
    assert (a.slot, a.dtype, a.dims, a.pitch, a.box, a.swizzle) == (
        "a",
        "float8_e4m3fn",
        [400, 300],
        400,
        [128, 128],
        128,
    )
    assert (b.slot, b.dims, b.box, b.swizzle) == ("b", [400, 264], [128, 64], 128)
    assert (a_scale.slot, a_scale.dims, a_scale.pitch, a_scale.box) == ("a_scale", [300, 4], 300 * 4, [128, 1])
    assert a_scale.swizzle == 0
    assert b_scale.slot is None
    assert (out.slot, out.dims, out.pitch, out.box, out.swizzle) == ("out", [264, 300], 528, [64, 64], 128)
    assert [r.slot for r in rest[:3]] == ["b_scale", None, None]
    assert rest[3:8] == [0, 0, 300, 264, 400]


def test_a_remembered_plan_is_the_one_that_would_be_made():
    """More problems than are remembered, in any order and twice, and ones that differ in a single field."""
    asked = [problem(m, n, 512) for m in range(1, 100) for n in (64, 576, 4096)]
    asked += [problem(64, 576, 512, num_sms=sms) for sms in (1, 16, 78)]
    asked += [_C.GemmProblem(**operands(64, 576, 512), machine=machine) for machine in ("H20", "H100")]
    asked += [problem(64, 576, 512, c=c) for c in ("bfloat16", "float32")]
    asked += [problem(64, 576, 512, ROW), problem(64, 576, 512, out_dtype="float32")]
    wider = operands(64, 576, 512)
    wider["a"] = view("float8_e4m3fn", [64, 512], [528, 1])
    asked.append(_C.GemmProblem(**wider))
    asked += [
        problem(128, 512, 512).with_swiglu(None, limit, pow2, 0.0, False) for limit in (None, 7.0) for pow2 in (0, 1)
    ]
    random.Random(0).shuffle(asked)
    for p in asked + asked[::-1]:
        assert repr(_C.gemm_planned(p)) == repr(plan_of(p))


def test_plan_of_a_cluster():
    """Two tiles one below the other: each CTA loads half of B's rows for both, with as many bytes a stage as alone."""
    p = problem(400, 264, 400)
    alone, pair = config_of(p, "128x128"), config_of(p, "128x128 pair")
    assert (alone.cluster, pair.cluster) == (1, 2)
    assert (alone.tiles, pair.tiles) == ((4, 3), (2, 3))
    plan = _C.gemm_plan(p, pair)
    assert plan.kernel == "gemm_sm90_block_bf16_128x128_pair"
    assert (plan.cluster, plan.grid) == ([2, 1, 1], [12, 1, 1])
    assert plan.shared_bytes == _C.gemm_plan(p, alone).shared_bytes
    a, b, *_ = plan.arguments
    assert (a.box, b.box) == ([128, 128], [128, 64])


def test_plan_of_a_split():
    """As many CTAs a cluster as segments; the output is written from registers, not through a map."""
    p = problem(5, 264, 2048)
    plan = _C.gemm_plan(p, config_of(p, "64x64 split"))
    assert plan.kernel == "gemm_sm90_block_bf16_64x64_split"
    assert (plan.cluster, plan.grid) == ([4, 1, 1], [4 * 5, 1, 1])
    a, b, _, _, out, *rest = plan.arguments
    assert (a.box, b.box, out.slot) == ([128, 64], [128, 64], None)
    assert [r.slot for r in rest[:3]] == ["b_scale", "out", None]


def test_operands_are_swapped_where_tensor_cores_bind():
    """By the model: on H20, whose tensor cores are a quarter, for a few rows; on H100 and H200 it never pays."""
    for m, name in ((1, "16x128"), (16, "16x128"), (32, "32x128"), (64, "64x64")):
        assert _C.gemm_select(_C.GemmProblem(**{**operands(m, 7168, 16384), "num_sms": 78}, machine="H20")).name == name
    for machine in ("H100", "H200"):
        names = {
            _C.gemm_select(_C.GemmProblem(**operands(m, n, k), machine=machine)).name
            for m in (1, 8, 16, 32)
            for n, k in DENSE_TABLE
        }
        assert not any(name.startswith(("16x", "32x")) for name in names), (machine, names)
    assert "more rows" in reasons_of(problem(17, 7168, 2048))["16x128"]


def test_clusters_are_for_what_loads_bind():
    """By the model: large products share B, one tile row cannot, nor can an odd SM."""
    assert _C.gemm_select(problem(4096, 7168, 4096)).name == "128x256 pair"
    assert _C.gemm_select(problem(4096, 7168, 4096, ROW)).name == "128x128 pair"
    segmented = problem(4096, 2112, 7168)
    assert _C.gemm_select(segmented).name == "128x128 pair"
    assert "two segments" in reasons_of(segmented)["128x256 pair"]
    assert "past M" in reasons_of(problem(128, 512, 512))["128x128 pair"]
    few = reasons_of(problem(512, 512, 2048, num_sms=1))
    assert "more SMs" in few["128x128 pair"]
    assert "more SMs" in few["64x64 split"]


def test_plan_of_row_scales_f32_and_c():
    p = problem(5, 264, 400, ROW, "float32", c="bfloat16")
    plan = _C.gemm_plan(p, config_of(p, "64x64"))
    assert plan.kernel == "gemm_sm90_row_f32_64x64"
    _, _, a_scale, b_scale, out, *rest = plan.arguments
    assert (a_scale.dims, a_scale.pitch) == ([5, 4], 8 * 4)
    assert (b_scale.slot, b_scale.dims, b_scale.pitch, b_scale.box) == ("b_scale", [264, 4], 264 * 4, [64, 1])
    assert out.slot is None
    assert [r.slot for r in rest[:3]] == [None, "out", "c"]
    assert rest[3:5] == [1, 264]


def test_plan_keeps_to_the_limits_of_tensor_maps():
    """cuTensorMapEncodeTiled: pitches multiples of 16, boxes at most 256, the inner one within the swizzle span."""
    sizes = {"float8_e4m3fn": 1, "bfloat16": 2, "float32": 4}
    for m, n, k, b_block in [(1, 8, 16, BLOCK), (3, 16, 144, ROW), (4097, 576, 7168, BLOCK), (127, 32768, 528, ROW)]:
        p = problem(m, n, k, b_block)
        for config, _ in _C.gemm_candidates(p):
            maps = [x for x in _C.gemm_plan(p, config).arguments if isinstance(x, _C.TensorMapSlot) and x.slot]
            without_out = config.name.endswith("split") or config.tile_m < 64
            assert len(maps) == (5 if b_block == ROW else 3 if without_out else 4)
            for x in maps:
                inner = x.box[0] * sizes[x.dtype]
                assert x.pitch % 16 == 0
                assert x.pitch >= x.dims[0] * sizes[x.dtype]
                assert inner % 16 == 0
                assert max(x.box) <= 256
                assert min(x.dims) >= 1
                assert x.swizzle in (0, inner)


def test_strided_operands_reach_the_tensor_maps():
    given = operands(64, 128, 256)
    given["a"] = view("float8_e4m3fn", [64, 256], [1024, 1])
    given["c"] = view("float32", [64, 128], [0, 1])
    plan = plan_of(_C.GemmProblem(**given))
    assert plan.arguments[0].pitch == 1024
    assert plan.arguments[9] == 0, "an expanded row has pitch 0"


@pytest.mark.parametrize("shape", [(0, 128, 128), (128, 0, 128), (128, 128, 0)])
def test_an_empty_product_is_a_problem_but_no_launch(shape):
    p = problem(*shape)
    assert (p.m, p.n, p.k) == shape
    with pytest.raises(RuntimeError, match="nothing to launch"):
        _C.gemm_plan(p, _C.gemm_select(problem(128, 128, 128)))


def test_reprs_say_what_matters():
    p = problem(300, 264, 400, c="float32")
    assert repr(p) == (
        "GemmProblem(m=300, n=264, k=400, b_scales=block, out=bfloat16, c=float32, num_sms=132, machine=H100)"
    )
    assert re.match(
        r"GemmConfig\(\d+x\d+( pair)?, stages=\d, cluster=\d, segments=1, grid=\d+, tiles=\dx\d+, band=\d+",
        repr(_C.gemm_select(p)),
    )
    assert "TensorMapSlot('a', float8_e4m3fn, dims=[400, 300]" in repr(plan_of(p))


BAD = {
    "a is not FP8": ("a", view("bfloat16", [64, 256], [256, 1]), "dtype float8_e4m3fn, got bfloat16"),
    "a on the CPU": ("a", view("float8_e4m3fn", [64, 256], [256, 1], -1), "a tensor on a CUDA device"),
    "a is 3-D": ("a", view("float8_e4m3fn", [2, 64, 256], [64 * 256, 256, 1]), "2 dimensions, got 3"),
    "a column-major": ("a", view("float8_e4m3fn", [64, 256], [1, 64]), r"row-major.*got stride \(1, 64\)"),
    "a's rows are 250 apart": ("a", view("float8_e4m3fn", [64, 240], [250, 1]), r"got stride \(250, 1\)|K = 240"),
    "a's rows overlap": ("a", view("float8_e4m3fn", [64, 256], [16, 1]), r"do not overlap, got stride \(16, 1\)"),
    "a is misaligned": ("a", view("float8_e4m3fn", [64, 256], [256, 1], 0, 8), "8 bytes past one"),
    "a too long": ("a", view("float8_e4m3fn", [1 << 31, 256], [256, 1]), r"sizes below 2\^31"),
    "scale of a too short": ("a_scale", view("float32", [64, 1], [1, 64]), r"shape \(64, 2\).*got shape \(64, 1\)"),
    "scale of a row-major": (
        "a_scale",
        view("float32", [64, 2], [2, 1]),
        r"stride \(1, a multiple.*got stride \(2, 1\)",
    ),
    "scale of a in FP8": ("a_scale", view("float8_e4m3fn", [64, 2], [1, 64]), "dtype float32, got float8_e4m3fn"),
    "b elsewhere": (
        "b",
        view("float8_e4m3fn", [128, 256], [256, 1], 1),
        r"device of 'a' \(cuda:0\), got one on cuda:1",
    ),
    "b has another K": ("b", view("float8_e4m3fn", [128, 128], [128, 1]), r"K = 256 columns.*got shape \(128, 128\)"),
    "N is 12": ("b", view("float8_e4m3fn", [12, 256], [256, 1]), "N a multiple of 8, got N = 12"),
    "scale of b transposed": ("b_scale", view("float32", [2, 1], [1, 1]), r"shape \(1, 2\).*got shape \(2, 1\)"),
    "scale of b on the CPU": ("b_scale", view("float32", [1, 2], [2, 1], -1), "not on a CUDA device"),
    "other blocks": ("b_block", (64, 64), r"\(128, 128\) or \(1, 128\), got \(64, 64\)"),
    "fp16 out": ("out_dtype", "float16", "bfloat16 or float32"),
    "c of another shape": ("c", view("float32", [64, 64], [64, 1]), r"shape \(64, 128\), got shape \(64, 64\)"),
    "c of another dtype": ("c", view("float8_e4m3fn", [64, 128], [128, 1]), "bfloat16 or float32, got float8_e4m3fn"),
    "c column-major": ("c", view("float32", [64, 128], [1, 64]), r"row-major.*got stride \(1, 64\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_operands_are_named(name):
    """The checks of the C++ side, which CUDA tensors meet; those of the Python side are in test_errors.py."""
    argument, value, text = BAD[name]
    given = operands(64, 128, 256)
    _C.GemmProblem(**given)
    given[argument] = value
    with pytest.raises(RuntimeError, match=rf"fastfp8\.gemm: argument '\w+': expected .*{text}|{text}") as raised:
        _C.GemmProblem(**given)
    if name != "a's rows are 250 apart":
        assert f"argument '{argument}'" in str(raised.value)


def test_k_must_be_a_multiple_of_16():
    with pytest.raises(RuntimeError, match="argument 'a': expected K a multiple of 16, got K = 24"):
        problem(64, 128, 24)


def entry_parameters(module, kernel):
    """The .param declarations of a kernel in its PTX, as 'map', 'u64' or 'u32'."""
    text = (KERNELS / f"{module}.ptx").read_text()
    head = re.search(rf"\.visible \.entry {kernel}\((.*?)\n\)", text, re.S)[1]
    kinds = []
    for line in head.splitlines():
        if "[128]" in line:
            assert re.search(r"\.align (64|128) ", line), "a tensor map is at least 64-byte aligned"
            kinds.append("map")
        elif ".param" in line:
            kinds.append(re.search(r"\.param \.(\w+)", line)[1])
    return kinds


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("b_block", [BLOCK, ROW])
def test_plans_match_the_parameters_of_the_built_kernels(b_block, out_dtype):
    """Every instance that a plan can name is in the PTX, with parameters of the kinds and in the order of the plan."""
    p = problem(512, 512, 512, b_block, out_dtype)
    kind = {_C.TensorMapSlot: "map", _C.TensorSlot: "u64", int: "u32"}
    for config, _ in _C.gemm_candidates(p):
        plan = _C.gemm_plan(p, config)
        assert [kind[type(x)] for x in plan.arguments] == entry_parameters(plan.module, plan.kernel)
