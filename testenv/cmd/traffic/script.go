package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/nftrace/nftrace/testenv/topo"
)

// script runs the lines of a file, each of them in a network namespace:
//
//	NS udp-send -n 3 172.17.0.2:9   any of traffic's own commands
//	- NS tcp-get …                  the same; it may fail
//	& NS udp-send …                 the same, beside what comes behind
//	wait                            for all that & began
//	serve NS tcp-serve :80          a server, until the script ends
//	sh iptables-legacy -Z           a shell line, in the namespace of the script
//	say TEXT                        a line on standard error
//
// All of it is one process: nothing is started while packets are sent, and when
// it has ended no socket is left that would send one more.
func script(name string, stderr io.Writer) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	s := &scriptRun{stderr: stderr}
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		if err := s.line(lines.Text()); err != nil {
			return fmt.Errorf("line %d: %s: %w", n, lines.Text(), err)
		}
	}
	if err := s.wait(); err != nil {
		return err
	}
	return lines.Err()
}

type scriptRun struct {
	stderr io.Writer
	wg     sync.WaitGroup
	mu     sync.Mutex
	err    error // of what runs beside
}

func (s *scriptRun) wait() error {
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *scriptRun) line(text string) error {
	words := strings.Fields(text)
	var may, beside bool
	for len(words) > 0 && (words[0] == "-" || words[0] == "&") {
		may = may || words[0] == "-"
		beside = beside || words[0] == "&"
		words = words[1:]
	}
	switch {
	case len(words) == 0 || strings.HasPrefix(words[0], "#"):
		return nil
	case words[0] == "wait":
		return s.wait()
	case words[0] == "sh":
		_, line, _ := strings.Cut(text, "sh ")
		cmd := exec.Command("sh", "-ec", line)
		cmd.Stdout, cmd.Stderr = s.stderr, s.stderr
		return cmd.Run()
	case words[0] == "say":
		_, err := fmt.Fprintln(s.stderr, strings.Join(words[1:], " "))
		return err
	case len(words) < 3:
		return fmt.Errorf("want NS COMMAND ADDRESS")
	case words[0] == "serve":
		o, addr, err := parse(words[2:], s.stderr)
		if err != nil {
			return err
		}
		o.forever = true
		ready := make(chan struct{})
		o.onReady = func() { close(ready) }
		ended := make(chan error, 1)
		go func() {
			ended <- topo.Within(words[1], func() error { return command(words[2], addr, o, io.Discard) })
		}()
		select {
		case <-ready:
			return nil
		case err := <-ended:
			return err
		}
	}
	o, addr, err := parse(words[1:], s.stderr)
	if err != nil {
		return err
	}
	run := func() error {
		err := topo.Within(words[0], func() error { return command(words[1], addr, o, io.Discard) })
		if err != nil && may {
			fmt.Fprintf(s.stderr, "traffic: %s: %v\n", text, err)
			return nil
		}
		return err
	}
	if !beside {
		return run()
	}
	s.wg.Go(func() {
		if err := run(); err != nil {
			s.mu.Lock()
			s.err = fmt.Errorf("%s: %w", text, err)
			s.mu.Unlock()
		}
	})
	return nil
}
