"""Training steps: `make_train_step`, in which each kind of step is a program, and TrainState. Imports all rooms before.

`step_functions` computes the steps, `train_step` compiles them and picks, `step_counter` knows on the host which
step is next.
"""
