"""Other people's programs with our solver handed in. `make integration` installs them and runs these tests."""
