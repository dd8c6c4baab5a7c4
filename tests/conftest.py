import signal

# Started in the background of a script, a process inherits an ignored SIGINT, and so would those that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
