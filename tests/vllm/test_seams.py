"""vLLM's insides are where we think they are, in the version that is installed."""

import pytest
import vllm

from monitor.engines.vllm.seams import FIELDS, SEAMS, Seam, missing_fields, problem
from monitor.engines.vllm.support import ARCHITECTURES, TESTED_VERSIONS


def test_the_installed_version_is_a_tested_one():
    assert vllm.__version__ in TESTED_VERSIONS


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.where.partition(":")[2])
def test_every_private_name_is_there_with_its_parameters(seam):
    assert problem(seam) is None


def test_every_field_we_read_or_write_is_there():
    assert missing_fields() == []
    assert len(FIELDS) >= 6


def test_a_name_that_is_gone_or_has_changed_is_told():
    gone = Seam("vllm.v1.engine.output_processor:OutputProcessor.judge", "")
    assert "gone" in problem(gone)
    changed = Seam("vllm.v1.engine.output_processor:OutputProcessor.add_request", "", ("verdict",))
    assert "verdict" in problem(changed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_listed_architecture_exists_in_vllm(architecture):
    from vllm.model_executor.models.registry import ModelRegistry

    assert architecture in ModelRegistry.get_supported_archs()
