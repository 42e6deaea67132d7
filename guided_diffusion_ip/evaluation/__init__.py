"""From files of images to a table of metrics; the numbers themselves are in metrics/.

reference   statistics stored in an npz: OpenAI's, or evaluations/make_reference.py's
features    a set of images, over all processes -> statistics, kept features, logit sums
evaluate    two sets -> numbers
report      numbers -> a table for people, JSON for programs
"""
