package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawIO is read or write without telling the scheduler.
func rawIO(call uintptr, fd int, buf []byte) error {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)))
	switch {
	case errno != 0:
		return errno
	case int(n) != len(buf):
		return errShort
	}
	return nil
}
