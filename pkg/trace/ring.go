package trace

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ring reads the ring buffer's records where the kernel wrote them. Package ringbuf of
// cilium/ebpf copies them and locks, which costs more than to look at a record.
// It is for one goroutine.
type ring struct {
	epoll      int
	cons, prod []byte // mapped
	consPos    *uint64
	prodPos    *uint64
	data       []byte // mapped twice in a row, so that no record is in two pieces
	// at is behind the record that was handed out; up to seen, there are more.
	at, seen uint64
	timedOut bool
}

// Of struct bpf_ringbuf_hdr (kernel/bpf/ringbuf.c), whose first member is the length.
const (
	ringBusy    = 1 << 31
	ringDiscard = 1 << 30
	ringHdr     = 8
)

func newRing(m *ebpf.Map) (*ring, error) {
	r := &ring{epoll: -1}
	if err := r.open(m.FD(), int(m.MaxEntries())); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *ring) open(fd, size int) (err error) {
	page := os.Getpagesize()
	if r.cons, err = unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map the reader's page: %w", err)
	}
	if r.prod, err = unix.Mmap(fd, int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map the records: %w", err)
	}
	r.consPos, r.prodPos = (*uint64)(unsafe.Pointer(&r.cons[0])), (*uint64)(unsafe.Pointer(&r.prod[0]))
	r.data = r.prod[page:]
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	// Edge-triggered: poll would return for each record, be it one that wakes nobody.
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	if err := unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func (r *ring) close() error {
	var err error
	if r.epoll >= 0 {
		err = unix.Close(r.epoll)
	}
	for _, b := range [][]byte{r.cons, r.prod} {
		if b != nil {
			err = errors.Join(err, unix.Munmap(b))
		}
	}
	return err
}

// read returns the next record, whose bytes are valid until the next call. When there is
// none, it waits until the kernel wakes it or deadline is over, and then reads what came
// meanwhile before it returns os.ErrDeadlineExceeded.
func (r *ring) read(deadline time.Time) ([]byte, error) {
	for {
		if rec := r.next(); rec != nil {
			return rec, nil
		}
		if r.timedOut {
			r.timedOut = false
			return nil, os.ErrDeadlineExceeded
		}
		var err error
		if r.timedOut, err = r.wait(deadline); err != nil {
			return nil, err
		}
	}
}

// next gives the record before back to the kernel and returns the next one, nil if there
// is none.
func (r *ring) next() []byte {
	atomic.StoreUint64(r.consPos, r.at)
	for {
		if r.at == r.seen {
			if r.seen = atomic.LoadUint64(r.prodPos); r.at == r.seen {
				return nil
			}
		}
		start := r.at & uint64(len(r.data)/2-1)
		n := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[start])))
		if n&ringBusy != 0 {
			continue // another CPU is about to have written it
		}
		size := n &^ ringDiscard
		r.at += ringHdr + (uint64(size)+7)&^7
		if n&ringDiscard == 0 {
			return r.data[start+ringHdr:][:size:size]
		}
	}
}

// written is how many bytes of records there were so far, with those that are about to be written,
// and taken how many of them next has returned.
func (r *ring) written() uint64 { return atomic.LoadUint64(r.prodPos) }
func (r *ring) taken() uint64   { return r.at }

// wait returns when the kernel says so or deadline is over, and which it was.
func (r *ring) wait(deadline time.Time) (over bool, err error) {
	for {
		// Rounded up: the last millisecond is not spent in a loop.
		ms := (max(time.Until(deadline), 0) + time.Millisecond - 1) / time.Millisecond
		var events [1]unix.EpollEvent
		n, err := unix.EpollWait(r.epoll, events[:], int(ms))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n == 0, err
	}
}
