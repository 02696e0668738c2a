"""Files for other runtimes: ONNX graphs, ``.onnx_adapter`` files, GGUF, adapters for vLLM and transformers."""
