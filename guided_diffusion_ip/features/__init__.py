"""Feature spaces: images -> numbers that metrics compare.

spaces             the spaces by name: Inception, pixels, an ONNX file
inception          the Inception network of FID, as in torch-fidelity and ADM's evaluator
inception_weights  its weights: where they are found, and from which files they are read
tf_graph           the TensorFlow graph that ADM's evaluator downloads, read without TensorFlow
"""
