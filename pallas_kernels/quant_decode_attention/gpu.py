def attend(*args, **kwargs):
    raise NotImplementedError("to come")
