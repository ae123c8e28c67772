"""Being asked to stop: noticed once, told apart, and the program's own handlers come back."""

import os
import signal
import threading

import pytest

from student_trainer.stopping import Interrupted, StopRequest


def test_the_first_signal_asks_and_what_listened_before_listens_again():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and str(stop.outcome()) == "stopped by SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # launchers send several
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_asks_once_and_the_second_time_it_does_not_wait():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and isinstance(stop.outcome(), Interrupted)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_that_only_hears_of_it_says_so():
    assert str(StopRequest().outcome()) == "stopped by another process"


def test_hearing_of_it_is_being_asked_but_ends_no_wait_for_a_signal_to_this_process():
    with StopRequest() as stop:
        stop.heard = True
        stop.wait(0.05)  # as long as it says
        assert stop() and stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        stop.wait(3600.0)
        assert str(stop.outcome()) == "stopped by SIGTERM"


def test_a_signal_to_a_forked_process_is_not_one_to_this_process():
    with StopRequest() as stop:
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0 if stop() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not stop.arrived()
        signal.raise_signal(signal.SIGTERM)
        assert stop.arrived()
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_of_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
