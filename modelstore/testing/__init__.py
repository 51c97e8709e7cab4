"""What each codec and each storage must do, as classes of tests to inherit, and a storage that fails: for whoever adds one.

Needs pytest and hypothesis: `pip install 'modelstore[testing]'`.
"""
