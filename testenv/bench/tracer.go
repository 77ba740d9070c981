package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

// startTimeout bounds the wait for a tracer to be attached, or to end.
const startTimeout = 2 * time.Minute

// tracer is an nftrace that runs.
type tracer struct {
	cmd    *exec.Cmd
	output string        // path of what it prints
	stderr *bytes.Buffer // read when it has ended
	ended  chan error
	attach time.Duration // from exec to the ready-file
}

func startTracer(ctx context.Context, program, dir string, args ...string) (*tracer, error) {
	t := &tracer{
		output: filepath.Join(dir, "out"), stderr: &bytes.Buffer{},
		ended: make(chan error, 1),
	}
	ready := filepath.Join(dir, "ready")
	if err := os.Remove(ready); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	t.cmd = exec.CommandContext(ctx, program, append([]string{"--format", "trace", "-o", t.output, "--ready-file", ready}, args...)...)
	t.cmd.Stderr = t.stderr
	start := time.Now()
	if err := t.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { t.ended <- t.cmd.Wait() }()
	for {
		if _, err := os.Stat(ready); err == nil {
			t.attach = time.Since(start)
			return t, nil
		}
		select {
		case err := <-t.ended:
			return nil, fmt.Errorf("%s ended before it was attached: %v\n%s", t.cmd, err, t.stderr)
		case <-time.After(time.Millisecond):
		}
		if time.Since(start) > startTimeout {
			t.cmd.Process.Kill()
			return nil, fmt.Errorf("%s was not attached after %v", t.cmd, startTimeout)
		}
	}
}

// written waits until nothing was written for a while.
func (t *tracer) written() error {
	const step, calm = 25 * time.Millisecond, 12
	var size int64
	for same := 0; same < calm; same++ {
		time.Sleep(step)
		fi, err := os.Stat(t.output)
		if err != nil {
			return err
		}
		if fi.Size() != size {
			size, same = fi.Size(), 0
		}
	}
	return nil
}

// summary is what nftrace says at its end.
type summary struct{ packets, records, lost, unresolved int }

var summaryLine = regexp.MustCompile(`(?m)^nftrace: (\d+) packets, (\d+) records, (\d+) lost.*, (\d+) unresolved$`)

func (t *tracer) stop() (summary, error) {
	t.cmd.Process.Signal(syscall.SIGINT)
	select {
	case err := <-t.ended:
		if err != nil {
			return summary{}, fmt.Errorf("%s: %w\n%s", t.cmd, err, t.stderr)
		}
	case <-time.After(startTimeout):
		t.cmd.Process.Kill()
		return summary{}, fmt.Errorf("%s did not end on SIGINT", t.cmd)
	}
	m := summaryLine.FindSubmatch(t.stderr.Bytes())
	if m == nil {
		return summary{}, fmt.Errorf("%s: no summary in its messages:\n%s", t.cmd, t.stderr)
	}
	var s summary
	for i, to := range []*int{&s.packets, &s.records, &s.lost, &s.unresolved} {
		*to, _ = strconv.Atoi(string(m[i+1]))
	}
	return s, nil
}
