package testenv

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
)

// archive writes a cpio archive in the "newc" format, the one that the kernel
// unpacks as an initramfs (init/initramfs.c, Documentation/driver-api/early-userspace/buffer-format.rst).
//
// It is written here rather than taken from a library: the format has not
// changed since 1990, the writer is smaller than the code that would adapt a
// library to it, and the libraries that have one bring a distribution along.
//
// Parent directories are created by themselves. The first error sticks and
// comes out of close.
type archive struct {
	w    *bufio.Writer
	size int64 // bytes written, for padding
	ino  int
	seen map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), seen: map[string]bool{"/": true}}
}

func (a *archive) put(p []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(p)
	a.size += int64(n)
	a.err = err
}

func (a *archive) pad() {
	if n := a.size % 4; n != 0 {
		a.put(make([]byte, 4-n))
	}
}

// header writes one entry's header and name. mode holds the S_IF* bits.
func (a *archive) header(name string, mode uint32, size int64) {
	if a.err == nil && size >= 1<<32 {
		a.err = fmt.Errorf("%s: larger than 4 GiB, which a cpio archive cannot hold", name)
	}
	a.ino++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
	// rdevmajor, rdevminor, namesize, check
	a.put(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0))
	a.put(append([]byte(name), 0))
	a.pad()
}

const (
	sIFDIR = 0o040000
	sIFREG = 0o100000
	sIFLNK = 0o120000
)

// dir adds a directory and its parents, once.
func (a *archive) dir(name string) {
	name = path.Clean("/" + name)
	if a.seen[name] {
		return
	}
	a.dir(path.Dir(name))
	a.seen[name] = true
	mode := uint32(0o755)
	if name == "/tmp" {
		mode = 0o1777
	}
	a.header(name[1:], sIFDIR|mode, 0)
}

// data adds a regular file from memory.
func (a *archive) data(name string, perm fs.FileMode, content []byte) {
	name = path.Clean("/" + name)
	a.dir(path.Dir(name))
	a.seen[name] = true
	a.header(name[1:], sIFREG|uint32(perm.Perm()), int64(len(content)))
	a.put(content)
	a.pad()
}

// symlink adds a symbolic link.
func (a *archive) symlink(name, target string) {
	name = path.Clean("/" + name)
	a.dir(path.Dir(name))
	a.seen[name] = true
	a.header(name[1:], sIFLNK|0o777, int64(len(target)))
	a.put([]byte(target))
	a.pad()
}

// file copies one file of the host, following symbolic links.
func (a *archive) file(name, host string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(host)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	if !st.Mode().IsRegular() {
		a.err = fmt.Errorf("%s: not a regular file", host)
		return
	}
	name = path.Clean("/" + name)
	a.dir(path.Dir(name))
	a.seen[name] = true
	a.header(name[1:], sIFREG|uint32(st.Mode().Perm()), st.Size())
	if a.err != nil {
		return
	}
	n, err := io.Copy(a.w, io.LimitReader(f, st.Size()))
	a.size += n
	if err == nil && n != st.Size() {
		err = fmt.Errorf("%s: changed while it was read", host)
	}
	a.err = err
	a.pad()
}

// tree copies a file, or a directory with all that is in it. Symbolic links
// inside a directory stay links.
func (a *archive) tree(name, host string) {
	if a.err != nil {
		return
	}
	st, err := os.Stat(host)
	if err != nil {
		a.err = err
		return
	}
	if !st.IsDir() {
		a.file(name, host)
		return
	}
	// WalkDir does not follow a root that is a link.
	host, err = filepath.EvalSymlinks(host)
	if err != nil {
		a.err = err
		return
	}
	err = filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := path.Join(name, filepath.ToSlash(strings.TrimPrefix(p, host)))
		switch {
		case d.IsDir():
			a.dir(to)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			a.symlink(to, target)
		case d.Type().IsRegular():
			a.file(to, p)
		}
		return a.err
	})
	if a.err == nil {
		a.err = err
	}
}

// close writes the trailer and pads to a page, so that another archive can follow.
func (a *archive) close() error {
	a.header("TRAILER!!!", 0, 0)
	if n := a.size % 4096; n != 0 {
		a.put(make([]byte, 4096-n))
	}
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}

// sortedKeys returns the keys of m in order, so that the same content gives the
// same archive.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
