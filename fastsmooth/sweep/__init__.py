"""Many runs: python -m fastsmooth.sweep"""
