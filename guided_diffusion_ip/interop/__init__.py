"""Other people's files and libraries.

adm_checkpoint          state_dicts with guided-diffusion's names -> networks
edm_pickle, edm_networks    EDM's .pkl files, read without running them; its networks by name
ddim_checkpoint         checkpoints of DDIM's official code
safetensors_file        weights and config in one file
diffusers_models, diffusers_schedulers    diffusers' networks; epsilon scaling in its pipelines
"""
