def run(context, publish): pass
