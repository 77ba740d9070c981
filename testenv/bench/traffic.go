package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/testenv/topo"
)

// port is where the datagrams go to in ext.
const port = 4711

// flow sends datagrams from one namespace to another and reads them there. It is
// used by one thread and makes plain system calls: nothing of the Go runtime
// runs between a datagram and the next.
type flow struct {
	from, to int // sockets
	buf      []byte
}

func newFlow(size int) (*flow, error) {
	f := &flow{buf: make([]byte, size)}
	var err error
	if f.to, err = socketIn("ext"); err != nil {
		return nil, err
	}
	ext := [4]byte{10, 211, 55, 1}
	if err := unix.Bind(f.to, &unix.SockaddrInet4{Addr: ext, Port: port}); err != nil {
		return nil, fmt.Errorf("bind in ext: %w", err)
	}
	if f.from, err = socketIn("c2"); err != nil {
		return nil, err
	}
	if err := unix.Connect(f.from, &unix.SockaddrInet4{Addr: ext, Port: port}); err != nil {
		return nil, fmt.Errorf("connect in c2: %w", err)
	}
	return f, nil
}

// socketIn makes a UDP socket in a namespace.
func socketIn(ns string) (fd int, err error) {
	err = topo.Within(ns, func() error {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		// A datagram that does not come is a failure, not a hang.
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	})
	if err != nil {
		err = fmt.Errorf("socket in %s: %w", ns, err)
	}
	return fd, err
}

// send sends n datagrams and returns when all were read.
func (f *flow) send(n int) error {
	for i := range n {
		if err := rawIO(unix.SYS_WRITE, f.from, f.buf); err != nil {
			return fmt.Errorf("datagram %d: send: %w", i+1, err)
		}
		if err := rawIO(unix.SYS_READ, f.to, f.buf); err != nil {
			return fmt.Errorf("datagram %d did not arrive: %w", i+1, err)
		}
	}
	return nil
}

var errShort = errors.New("datagram of another size")
