"""Studies: whole matrices of pre-trainings, fine-tunings and measurements, run and told as one."""
