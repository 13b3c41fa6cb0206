"""What is made at load in two levels, or not at all, against numbers worked out by hand and in numpy."""

import numpy as np
import pytest
import torch

from framework.quantization.online import quantize

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_two_levels_are_the_nearest_value_of_what_the_outer_scale_leaves():
    w = torch.randn(4, 1056, generator=torch.Generator().manual_seed(5)) * torch.logspace(-2, 4, 4).unsqueeze(1)
    w[1, 512:1024] = 0
    made = quantize(w, "mxfp4_dualscale", 0)
    outer = np.stack([np.abs(w.numpy()[:, a : a + 512]).max(1) / np.float32(6) for a in (0, 512, 1024)], axis=1)
    assert np.array_equal(made.outer.numpy(), outer)
    left = w.numpy() / np.where(outer == 0, 1, outer).repeat(512, axis=1)[:, :1056].astype(np.float32)
    blocks = np.abs(left).reshape(4, 33, 32).max(2)
    exponents = np.where(blocks == 0, 0, np.floor(np.log2(np.where(blocks == 0, 1, blocks))) - 2 + 127)
    assert np.array_equal(made.scale.numpy(), exponents)
    power = (2.0 ** (exponents - 127)).repeat(32, axis=1)
    wanted = np.minimum(np.abs(left) / power, 6)
    found = FP4[made.codes.numpy() & 7]
    np.testing.assert_allclose(np.abs(found - wanted), np.abs(wanted[..., None] - FP4).min(-1), atol=1e-6)


def test_eight_bit_activations_change_nothing_of_the_weight():
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    a, b = quantize(w, "mxfp4", 0), quantize(w, "w4a8_mxfp", 0)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("scheme", ["float", "w8a8_static", "w4a4_dynamic"])
def test_a_scheme_that_is_not_made_at_load_is_an_error(scheme):
    with pytest.raises(ValueError, match=scheme):
        quantize(torch.ones(2, 32), scheme, 0)
