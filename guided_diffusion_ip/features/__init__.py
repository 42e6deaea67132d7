"""Feature spaces: images -> numbers that metrics compare.

space              what a space must offer (a Protocol), and what it returns
spaces             SPACES by name, and open_features
inception_space    Inception as a feature space, for the published scores
pixels             the pixels themselves
onnx_space         any network in an ONNX file; onnx_file finds weights that are kept outside of it
inception          the Inception network of FID, as in torch-fidelity and ADM's evaluator
inception_weights  its weights: where they are found, and from which files they are read
tf_graph           the TensorFlow graph that ADM's evaluator downloads, read without TensorFlow
"""
