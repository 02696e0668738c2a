"""What other runtimes take: ONNX graphs, ``.onnx_adapter`` files, folders for vLLM and transformers."""
