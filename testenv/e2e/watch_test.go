package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A watch is one nftrace under which one ruleset after the other is loaded and meets its
// traffic: starting it takes longer than all that together.
type watch struct {
	p     *process
	out   *os.File
	stdin io.Closer // of the command that nftrace waits for
	// text is what nftrace has printed and no check has taken; partial the beginning of a line.
	text, partial []byte
}

const (
	// settled is how long nftrace prints nothing when it has printed all that was sent: it
	// looks at its buffer every 50 ms.
	settled = 150 * time.Millisecond
	// overdue is how long nothing must come until what is missing is believed to be so.
	overdue = 20 * time.Second
	// heldFor is how many seconds fragments wait for others: nftrace tells of them when they do
	// no longer.
	heldFor = 5
)

// startWatch starts nftrace with flags and returns once it is attached. Of a module that a
// ruleset brought nftrace would miss the first packets.
func startWatch(t *testing.T, flags ...string) *watch {
	t.Helper()
	sh(t, holdFragments(heldFor))
	sh(t, "modprobe -a ip_tables ip6_tables br_netfilter nf_nat nf_defrag_ipv6 nf_tables nf_flow_table nfnetlink_queue")
	file := filepath.Join(t.TempDir(), "out")
	r, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	t.Cleanup(func() { stdin.Close() })
	w := &watch{stdin: stdin}
	w.p = attached(t, "", func(c *exec.Cmd) { c.Stdin = r }, append(flags, "-o", file, "--", "cat")...)
	if w.out, err = os.OpenFile(file, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.out.Close() })
	return w
}

// read takes what was printed meanwhile, as far as its lines are whole; it tells whether there
// was something. What it took is no longer in the file, which is in the VM's memory: 74 rulesets of
// nf_tables printed 119 MiB.
func (w *watch) read() (more bool, err error) {
	data, err := io.ReadAll(w.out)
	if len(data) == 0 || err != nil {
		return false, err
	}
	at, err := w.out.Seek(0, io.SeekCurrent)
	if err != nil {
		return false, err
	}
	if err := unix.Fallocate(int(w.out.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, at); err != nil {
		return false, fmt.Errorf("drop what was read: %w", err)
	}
	data = append(w.partial, data...)
	end := bytes.LastIndexByte(data, '\n') + 1
	w.text, w.partial = append(w.text, data[:end]...), bytes.Clone(data[end:])
	return true, nil
}

// take calls check with what nftrace has printed since the last time, whenever it has settled,
// until check finds it right, and returns what check said last. What was wrong is not seen
// again.
func (w *watch) take(check func(out []byte) error) error {
	err := errors.New("not checked")
	checked := false
	for last := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		more, rerr := w.read()
		if rerr != nil {
			return rerr
		}
		if more {
			last, checked = time.Now(), false
		}
		if !checked && time.Since(last) >= settled {
			if checked, err = true, check(w.text); err == nil {
				w.text = nil
				return nil
			}
			last = time.Now()
		}
		select {
		case <-w.p.ended:
			return fmt.Errorf("nftrace ended: %s", w.p.stderr.String())
		default:
		}
		if checked && time.Since(last) >= overdue {
			w.text = nil
			return err
		}
	}
}

// end ends nftrace, holds the rest of its output against check and its last words against
// what ordinary traffic must not have.
func (w *watch) end(t *testing.T, check func(rest []byte) error) {
	t.Helper()
	sh(t, holdFragments(heldForGood))
	w.stdin.Close()
	if status := w.p.status(); status != 0 {
		t.Errorf("nftrace: status %d", status)
	}
	if _, err := w.read(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(check(append(w.text, w.partial...)), checkSummary(w.p.stderr.String(), "")); err != nil {
		t.Errorf("behind the last ruleset: %v\nstderr:\n%s", err, w.p.stderr.String())
	}
}

// runTogether runs the cases that one nftrace can see one after the other under one, with flags,
// and then those that need one of their own, for which run gets none. rest checks what that one
// printed behind the last of its cases.
func runTogether[T interface{ needsOwn() bool }](t *testing.T, cases []T, run func(c T, w *watch), rest func(out []byte) error, flags ...string) {
	t.Helper()
	var shared, own []T
	for _, c := range cases {
		if c.needsOwn() {
			own = append(own, c)
		} else {
			shared = append(shared, c)
		}
	}
	if len(shared) > 0 {
		// Before any ruleset, or the first would have another nftrace's packets.
		w := startWatch(t, flags...)
		for _, c := range shared {
			run(c, w)
		}
		w.end(t, rest)
	}
	for _, c := range own {
		run(c, nil)
	}
}
