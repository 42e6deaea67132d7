"""From files of images to a table of metrics; the numbers themselves are in metrics/.

opening         what a user names -> a device, a feature space, the images of one side
reference       statistics stored in an npz: OpenAI's, or evaluations/make_reference.py's
reference_file  images -> such an npz
set_features    a set of images, over all processes -> statistics, kept features, logit sums
compare         a reference and samples -> numbers, by metrics.METRICS
evaluate        EvaluationRequest -> Evaluation: what evaluations/evaluator.py runs, for notebooks
published       what a paper states for the settings of some samples
report          an evaluation -> a table for people, JSON for programs
"""
