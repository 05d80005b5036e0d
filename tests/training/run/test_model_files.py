"""What the files of a model tell before it is loaded."""

import pytest

from galore_torch.training.run.model_files import require_weights


@pytest.mark.parametrize("header", ["x" * 100, "[1]", '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": [0, 0]}}'])
def test_weights_whose_header_cannot_be_read_are_left_to_who_loads_them(header, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    require_weights(str(tmp_path), ["attn"], ["q_proj"])


def test_weights_that_have_been_cut_off_are_refused(tmp_path):
    header = '{"q_proj.weight": {"data_offsets": [0, 16], "shape": [2, 2]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(15))
    with pytest.raises(ValueError, match="cut off"):
        require_weights(str(tmp_path), ["q_proj"], [])
    path.write_bytes(path.read_bytes() + b"\0")
    require_weights(str(tmp_path), ["q_proj"], ["q_proj"])
    with pytest.raises(ValueError, match="match no linear layer"):
        require_weights(str(tmp_path), ["attn"], [])
