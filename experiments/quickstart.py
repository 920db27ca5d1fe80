"""draft"""
from diffrwkv.config import base


def get_config(arg=None):
    c = base()
    return c
