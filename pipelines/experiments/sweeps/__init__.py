"""Hyperparameter search: many trials of one recipe, compared by validation WER.

sweep         run a sweep: start or resume trials until the number of trials or the budget is used up
trials        trials.json: the settings and results of all trials
search_space  the settings of the next trial: random, or by Optuna's TPE
asha          which trial continues, and to which step (ASHA)
trial_run     train one trial to a step
executors     where trials train: this process, one at a time, or the machines of a Ray cluster, in parallel
results       the table, the importance of settings, the best recipe

A trial is an ordinary run in a folder that its settings determine. It pauses at a rung with a trainer checkpoint; if it
is among the best there, it continues from that checkpoint. The next step depends only on trials.json and on seeds, and
trials.json is written before and after every job. So a sweep that was killed continues with the same command, on one
machine or on a cluster, and has the same result.

Ray Tune and Optuna studies do not offer this. Tune's ASHA stops trials where this one pauses them, its restore does not
allow changes such as more trials, and it needs Ray even for one process; an Optuna study does not store the state of
its sampler, and stops trials, too. So Optuna only proposes settings (for `tpe`), and Ray only runs trials on other
machines.
"""
