"""Documents of a text, and how long rows may be."""

import json

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from spmconvert.data.documents import read_documents
from spmconvert.data.tokens import row_length, tokenizer_hash
from tests.conftest import bert_config, gpt2_config


def test_separators_inside_of_a_document_are_no_line_ends(tmp_path):
    document = "a\u2028line separator, a next line\u0085 and a form feed\x0c, in one document of more than sixty-four signs"
    lines = [json.dumps({"text": document}, ensure_ascii=False)] * 2
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig", newline="\r\n")
    assert read_documents(file) == [document] * 2
    file = tmp_path / "t.txt"
    file.write_text(f"{document}\r\n\r\n{document}", encoding="utf-8", newline="")
    assert read_documents(file) == [document] * 2


@pytest.mark.parametrize(("wanted", "expected"), [(20, 20), (63, 63), (64, 64), (65, 64), (128, 64)])
def test_rows_end_where_positions_counted_from_padding_do(wanted, expected):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(
        **sizes, vocab_size=96, max_position_embeddings=66, pad_token_id=1, architectures=["RobertaModel"]
    )
    assert row_length(config, wanted) == expected
    ids = torch.randint(3, 90, (1, row_length(config, wanted)))
    with torch.no_grad():
        RobertaModel(config).eval()(input_ids=ids)


def test_rows_end_where_positions_do():
    config = bert_config(architectures=["BertModel"])
    assert [row_length(config, wanted) for wanted in (63, 64, 65)] == [63, 64, 64]
    assert row_length(gpt2_config(architectures=["GPT2LMHeadModel"], n_positions=32), 64) == 32


def test_a_tokenizer_is_known_by_its_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_hash(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    assert tokenizer_hash(tmp_path) == first
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    assert tokenizer_hash(tmp_path) != first
