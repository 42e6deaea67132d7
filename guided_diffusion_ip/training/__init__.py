"""Training: TrainSettings in, checkpoints out; a run of days that may be interrupted at any moment.

train_loop            step, log, save, stop; made of
  settings            every number that the loop takes, as one checked value
  protocols           what batches, objectives and objects with a state must have
  gradients, update   forward and backward; what follows once the ranks agree on the gradients
  optimizer, ema, precision, timestep_samplers, loss_statistics      parts of a step
  hooks               what is called every so many steps: preview, evaluation, validation
  run_state, checkpoint, resume    everything that a run has as objects, as files, and once more
  step_log, banner, guards, stopping    what it logs, what it refuses, what ends it
classifier_objective  the loss and the validation of a classifier for guidance
"""
