import pytest
import torch

from framework import ops
from framework.ops import register
from framework.ops.schema import OPERATORS, SCHEMAS, qualified_name
from tests.ops.schemas_of_torch_npu import SCHEMAS as OF_TORCH_NPU

register.ensure_registered("cpu")


def test_the_registered_set_is_the_set_that_is_compared():
    assert {qualified_name(schema) for schema in SCHEMAS} == set(OF_TORCH_NPU)


@pytest.mark.parametrize("name", OF_TORCH_NPU)
def test_the_dispatcher_prints_the_schema_of_the_wheel(name):
    qualified, _, overload = name.partition(".")
    found = [
        str(schema) for schema in torch._C._jit_get_schemas_for_operator(qualified) if schema.overload_name == overload
    ]
    assert found == [OF_TORCH_NPU[name]]


@pytest.mark.parametrize("name", OF_TORCH_NPU)
def test_every_operator_has_a_cpu_and_a_meta_kernel(name):
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_every_operator_is_an_attribute_of_the_package():
    assert all(callable(getattr(ops, name)) for name in OPERATORS)
    assert ops.npu_rms_norm is ops.npu_rms_norm
    with pytest.raises(AttributeError, match="npu_rms_nrm"):
        _ = ops.npu_rms_nrm


def test_dtype_numbers_are_256_plus_the_acl_number():
    assert (ops.FLOAT32, ops.FLOAT16, ops.INT8, ops.INT32, ops.BFLOAT16, ops.INT4) == (
        256,
        257,
        258,
        259,
        283,
        285,
    )
    assert (ops.FLOAT8_E4M3FN, ops.FLOAT8_E8M0FNU, ops.FLOAT4_E2M1FN_X2) == (292, 293, 296)
    assert (ops.ACL_FORMAT_ND, ops.ACL_FORMAT_FRACTAL_NZ) == (2, 29)
