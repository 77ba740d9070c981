package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// command is the program behind --.
type command struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
	err   error         // as what, then
}

func startCommand(args []string, stdin io.Reader, stderr io.Writer) (*command, error) {
	cmd := exec.Command(args[0], args[1:]...)
	// Standard output is for data.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stderr, stderr
	if err := cmd.Start(); err != nil {
		return nil, whyNoCommand(args[0], err)
	}
	c := &command{cmd: cmd, ended: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		close(c.ended)
	}()
	return c, nil
}

// done is nil, which no select takes, if there is no command.
func (c *command) done() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.ended
}

// kill ends a command that outlived the tracing, with all that it runs: the death of a shell does not end what it
// waits for. What the command has left behind is its own.
func (c *command) kill() {
	if c == nil {
		return
	}
	select {
	case <-c.ended:
		return
	default:
	}
	all := descendants("/proc", c.cmd.Process.Pid)
	// A shell first, or it would run what comes next.
	c.cmd.Process.Signal(syscall.SIGTERM)
	for _, pid := range all {
		syscall.Kill(pid, syscall.SIGTERM)
	}
}

// descendants are the children of a process, their children and so on, by what proc (/proc) says.
func descendants(proc string, of int) []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/stat"))
	for _, path := range stats {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		data, rerr := os.ReadFile(path)
		if err != nil || rerr != nil {
			continue // it ended
		}
		// "1 (the name) S 0 …": the name may have parentheses.
		f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		if len(f) < 2 {
			continue
		}
		if parent, err := strconv.Atoi(f[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	all := slices.Clone(children[of])
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}
