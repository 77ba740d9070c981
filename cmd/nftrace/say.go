package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/trace"
)

// This file owns how nftrace speaks. Messages go to stderr, begin with "nftrace: "
// and are one line each: what is wrong, and what helps. Data goes to stdout.

type speaker struct {
	w       io.Writer
	quiet   bool
	verbose bool
}

// fail says why nftrace could not run, or could not go on.
func (s *speaker) fail(err error) {
	fmt.Fprintf(s.w, "nftrace: %s\n", oneLine(err.Error()))
}

// say tells what people should know unless they asked for quiet.
func (s *speaker) say(format string, args ...any) {
	if !s.quiet {
		fmt.Fprintf(s.w, "nftrace: %s\n", oneLine(fmt.Sprintf(format, args...)))
	}
}

// detail tells what only -v wants to know.
func (s *speaker) detail(format string, args ...any) {
	if s.verbose {
		s.say(format, args...)
	}
}

// oneLine keeps a message on its line, and from the terminal what it would obey
// (control characters, those that turn the direction of writing).
func oneLine(s string) string {
	var b strings.Builder
	for _, r := range strings.TrimRight(s, "\n") {
		switch {
		case r == '\n':
			b.WriteString("; ")
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&b, "\\x%02x", r)
		default:
			fmt.Fprintf(&b, "\\u%04x", r)
		}
	}
	return b.String()
}

// whyNoFile says of an error of the file system what helps against it.
func whyNoFile(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		dir := filepath.Dir(path)
		if to, err := os.Readlink(path); err == nil {
			return fmt.Errorf("%s is a link to %s, where no file can be made: name that file itself, in a directory that is there", path, to)
		} else if _, err := os.Stat(dir); err == nil {
			return fmt.Errorf("%s: no files can be made in %s: choose another place", path, dir)
		}
		return fmt.Errorf("%s: the directory %s does not exist", path, dir)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s: %s is not a directory", path, filepath.Dir(path))
	case errors.Is(err, unix.EISDIR):
		return fmt.Errorf("%s is a directory: name a file in it", path)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s: the file system is read-only: choose another place", path)
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%s: the file system is full: choose another place", path)
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s: %w", path, err)
}

// whyNoCommand says why the program behind -- cannot run.
func whyNoCommand(name string, err error) error {
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("command %q is not in PATH; behind -- stands the program to run, nothing was traced", name)
	}
	var ee *exec.Error
	if errors.As(err, &ee) {
		err = ee.Err
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("command %q cannot be run: %w; nothing was traced", name, err)
}

// summary is the last line: what was seen, and what was not.
func summary(printed uint64, st events.Stats, l trace.Losses, d dropped, unresolved uint64) string {
	var causes []string
	add := func(n uint64, what string) {
		if n > 0 {
			causes = append(causes, fmt.Sprintf("%d %s", n, what))
		}
	}
	add(l.RingBuffer, "records: buffer full")
	add(l.Journeys, "packets: too many at once")
	add(l.Frames, "hook calls: too many at once on a CPU")
	add(st.Bad, "records: unreadable")
	add(l.Probes, "calls of probes skipped by the kernel, of whatever packets")
	add(st.Skipped, "hook calls: the kernel skipped the probe of nf_tables")
	add(d.packets, "packets: not written when interrupted again")
	add(d.records, "records: not read when interrupted again")
	lost := fmt.Sprintf("%d lost", l.Total()+st.Bad+st.Skipped+d.packets+d.records)
	if len(causes) > 0 {
		lost += " (" + strings.Join(causes, ", ") + ")"
	}
	return fmt.Sprintf("%d packets, %d records, %s, %d unresolved", printed, st.Records, lost, unresolved)
}
