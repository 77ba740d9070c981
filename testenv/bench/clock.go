package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// busy is the time, in ns, that tasks ran on the CPU since boot: with vm
// -icount, the number of instructions.
func busy() (int64, error) {
	// The sum is kept up to date when tasks change. So change to idle.
	if err := unix.Nanosleep(&unix.Timespec{Nsec: 1000}, nil); err != nil && err != unix.EINTR {
		return 0, err
	}
	b, err := os.ReadFile("/proc/schedstat")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) > 7 && string(f[0]) == "cpu0" {
			return strconv.ParseInt(string(f[7]), 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/schedstat has no CPU: %q", b)
}

// processTime is the time in ns that a process ran so far, all its threads together.
func processTime(pid int) (int64, error) {
	// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return ts.Nano(), nil
}
